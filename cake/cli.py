"""The commands: options become dataclasses, then one call. Heavy imports wait until then."""

import logging
from pathlib import Path
from typing import Any

import click

from cake import __version__
from cake.command import DEBUG, POSITIVE, SETTINGS, FiniteRange, errors_in_one_line, read_size, set_up_output
from cake.given import master_options, refuse_contradictions, worker_options

EXAMPLES = """\b
Examples:
  Everything on this machine, with the demo model:
    cake-cli --prompt "Why is the sky blue?"
  A worker; its name and blocks stand in the topology:
    cake-cli --model Meta-Llama-3-8B --mode worker --name worker0 \\
        --topology topology.yml --address 0.0.0.0:10128
  The master, on the machine where you want the answer:
    cake-cli --model Meta-Llama-3-8B --topology topology.yml --chat

The text goes to stdout, everything else to stderr.
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option(
    "--mode",
    type=click.Choice(["master", "worker"]),
    default="master",
    show_default=True,
    help="The master runs the prompt; a worker serves blocks of the model to masters.",
)
@click.option(
    "--model",
    help="A folder with config.json and safetensors, a bundle of cake-split-model, or a Hugging "
    "Face hub id, of which only the files are downloaded that this node needs.  "
    "[default: the demo model, SmolLM2-135M-Instruct]",
)
@click.option(
    "--topology",
    type=click.Path(path_type=Path),
    help="The YAML file that says which node serves which blocks; without it, all run here.",
)
@click.option("--name", help="Worker: its name in the topology.  [default: the only node in it]")
@click.option(
    "--address",
    default="127.0.0.1:10128",
    show_default=True,
    help="Worker: host:port to listen on; 0.0.0.0:10128 to be reached from other machines.",
)
@click.option(
    "--cluster-key",
    metavar="KEY",
    envvar="CAKE_CLUSTER_KEY",
    help="The same on every node: who does not know it is turned away, and all connections are encrypted. "
    "Rather set CAKE_CLUSTER_KEY: others on this machine can read options.  [default: none of that]",
)
@click.option(
    "--allow",
    metavar="ADDRESSES",
    multiple=True,
    help="Worker: let masters and other workers come from these addresses only, such as 192.168.1.0/24; "
    "several with commas, or several times.  [default: all]",
)
@click.option("--prompt", default="The sky is blue because ", show_default=True, help="The user's words.")
@click.option(
    "--system-prompt",
    default="You are a helpful AI assistant.",
    show_default=True,
    help="The system's words; with an empty string, the model's template may put in its own.",
)
@click.option(
    "--raw",
    is_flag=True,
    help="Continue the prompt as it is, without the model's chat template.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Keep talking (without --prompt); Ctrl-C stops an answer, Ctrl-D leaves. An error ends an answer "
    "and not the chat.",
)
@click.option(
    "-n",
    "--sample-len",
    type=POSITIVE,
    default=100,
    show_default=True,
    help="Tokens to generate at most.",
)
@click.option(
    "--temperature",
    type=FiniteRange(min=0),
    help="Higher is more surprising; 0 always takes the likeliest token.  [default: the model's, else 1.0]",
)
@click.option(
    "--top-p",
    type=FiniteRange(min=0, max=1, min_open=True),
    help="Choose among the likeliest tokens that together have this probability.  "
    "[default: the model's, else all]",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    help="Choose among this many likeliest tokens; 0 for all.  [default: the model's, else all]",
)
@click.option(
    "--repeat-penalty",
    type=FiniteRange(min=0.01, max=100),
    help="Above 1 discourages tokens that came recently.  [default: the model's, else 1.1]",
)
@click.option(
    "--repeat-last-n",
    type=click.IntRange(min=0),
    default=128,
    show_default=True,
    help="How many of the last tokens the penalty looks at.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=299792458,
    show_default=True,
    help="The same seed gives the same text; on a GPU but for rounding.",
)
@click.option(
    "--speculate",
    type=click.Choice(["none", "ngram"]),
    default="none",
    show_default=True,
    help="Guess several tokens ahead and check them in one pass: fewer trips through the workers, the same "
    "text. ngram guesses that what was said before is said again; it costs nothing, and helps where an "
    "answer repeats its prompt (summaries, edits, code).",
)
@click.option(
    "--draft-model",
    metavar="MODEL",
    help="Let this small model guess instead, a folder or hub id as for --model. It is loaded on the master "
    "and must have the model's vocabulary: Llama 3.2 1B for Llama 3.1 70B.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Numbers to compute in.  [default: the model's on an accelerator; on a CPU bfloat16 "
    "where it computes in it, else float32]",
)
@click.option(
    "--wire-dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "int8"]),
    help="Master: numbers in which hidden states travel to the workers and back. bfloat16 takes half of "
    "float32's bytes and int8 about a quarter, for slow links; both change the text a little where "
    "computing is in more. Nothing else changes: each worker computes in its own --dtype.  "
    "[default: the master's --dtype, but int8 for prompts where the link is slower than the worker]",
)
@click.option(
    "--quantize",
    type=click.Choice(["none", "int8", "int4"]),
    default="none",
    show_default=True,
    help="Keep the matrices of this node in fewer bits: int8 takes half of bfloat16's memory and "
    "hardly changes the text, int4 a quarter (the head: int8) and changes it a little. Nodes may differ.",
)
@click.option("--device", help="cuda:1, mps, xpu, cpu ...  [default: the best present]")
@click.option("--cpu", is_flag=True, help="The same as --device cpu.")
@click.option("--threads", type=POSITIVE, help="CPU threads of this process.  [default: all cores]")
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Most tokens a session may hold.  [default: the model's, at most 8192]",
)
@click.option(
    "--cache-memory",
    metavar="SIZE",
    callback=read_size,
    help="Memory for all sessions' keys and values on this node, such as 500MB or 2GiB; where it is short, "
    "those idle longest are dropped, and computed again when they go on.  "
    "[default: what the weights leave of 80% of the device's memory]",
)
@click.option(
    "--dead-after",
    type=FiniteRange(min=3),
    default=10,
    show_default=True,
    help="Seconds of silence after which a worker, or for a worker its master, is taken for gone; those who "
    "compute are not silent.",
)
@click.option(
    "--drain",
    type=FiniteRange(min=0),
    default=30,
    show_default=True,
    help="Worker: seconds that masters get after SIGTERM to finish their answers or move them to replicas; "
    "Ctrl-C, or a second SIGTERM, ends at once.",
)
@click.option(
    "--rejoin-timeout",
    type=FiniteRange(min=0),
    default=60,
    show_default=True,
    help="Master: seconds to wait for a lost worker whose blocks no replica serves, until a request fails.",
)
@click.option(
    "--adopt",
    is_flag=True,
    help="Master: load a lost worker's blocks here, where there is the memory, if it is not back at once.",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write which stage worked when to this file, for ui.perfetto.dev or chrome://tracing.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object instead of the streamed text: text, token_ids, finish_reason (stop, length, "
    "or error, with a line in error and the text so far) and figures.",
)
@click.option(
    "--api",
    metavar="HOST:PORT",
    help="Master: answer HTTP requests in the manner of OpenAI's API, Ollama's and Anthropic's instead of "
    "one prompt, until Ctrl-C or SIGTERM; 127.0.0.1:8080 for this machine alone, 0.0.0.0:8080 "
    "for others too.",
)
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="CAKE_API_KEY",
    help="With --api: what clients must know. Rather set CAKE_API_KEY.  [default: everybody may ask]",
)
@click.option(
    "--api-origin",
    metavar="ORIGIN",
    multiple=True,
    help="With --api: pages of this origin may ask too, such as https://chat.example.org; several times for "
    "several, * for any, null for files.  [default: the server's own page alone]",
)
@DEBUG
@click.version_option(__version__, prog_name="cake")
@errors_in_one_line
def main(mode: str, debug: bool, **options: Any) -> None:
    """Run a large language model of the Llama 3 family across your devices.

    Each worker serves a span of the model's transformer blocks; the master reads the prompt, sends
    hidden states through the workers, and prints the text that one machine would have written.
    """
    set_up_output(debug, logging.INFO if mode == "worker" else logging.WARNING)
    refuse_contradictions(mode, options)
    if mode == "worker":
        from cake.worker_command import run_worker

        run_worker(worker_options(options))
    else:
        from cake.master import run_master

        run_master(master_options(options))


@click.command(context_settings=SETTINGS)
@click.option("--model-path", required=True, help="The model's folder, or a Hugging Face hub id.")
@click.option("--topology", required=True, type=click.Path(path_type=Path), help="Who serves which blocks.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Where the bundles go.")
@DEBUG
@click.version_option(__version__, prog_name="cake")
@errors_in_one_line
def split_model(model_path: str, topology: Path, output: Path, debug: bool) -> None:
    """Cut a model into bundles, so that each node stores only its own blocks.

    For every node of the topology, OUTPUT/NODE-node/ gets a topology.yml and a model/ folder from
    which that worker starts alone; OUTPUT/master-node/ gets what the master needs:

    \b
      cake-cli --mode worker --model OUTPUT/worker0-node --address 0.0.0.0:10128
      cake-cli --model OUTPUT/master-node
    """
    set_up_output(debug, logging.WARNING)
    from cake.weights.split import split

    split(model_path, topology, output)
