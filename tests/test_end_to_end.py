"""The demo model in real processes over real sockets, held against transformers."""

import asyncio
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENT, PROMPTS, N, cpu_thread, greedy_ids, run
from real_processes import GREEDY, Cli, Start, answered, memory, start_workers, until_stop

from cake import kernels
from cake.model.tokenizer import Tokenizer
from cake.pipeline import open_pipeline
from cake.scheduler import Scheduler
from cake.session import Session
from cake.topology import load_topology
from cake.weights.checkpoint import Checkpoint, block_of
from cake.weights.split import split

LAYOUTS = {  # what each worker serves; the rest runs on the master
    "one worker": ["0-29"],
    "three workers": ["0-9", "10-19", "20-29"],
    "master at start, middle and end": ["3-9", "15-24, 26"],
}
CHUNKS = {"one worker": 512, "three workers": 7, "master at start, middle and end": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_is_that_of_one_machine(
    processes: Start, demo_model: Path, tmp_path: Path, expected: dict[str, list[int]], layout: str
) -> None:
    topology, _ = start_workers(processes, tmp_path, *LAYOUTS[layout])
    master = processes("--topology", topology, "--raw", "--prompt", PROMPTS[1], "-n", N, "--json", *GREEDY)

    async def in_this_process() -> None:
        checkpoint, tokenizer = Checkpoint(demo_model), Tokenizer(demo_model)
        pipeline = await open_pipeline(checkpoint, load_topology(topology), cpu_thread(), 512, PATIENT)
        try:
            answers = await asyncio.gather(
                *(greedy_ids(pipeline, tokenizer.encode(p), N, CHUNKS[layout]) for p in PROMPTS)
            )
            assert answers == [expected[prompt] for prompt in PROMPTS]
            await check_logits(pipeline, demo_model, tokenizer.encode(PROMPTS[1]))
        finally:
            await pipeline.close()

    run(in_this_process())
    code, stdout, stderr = master.finish()
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["token_ids"] == until_stop(expected[PROMPTS[1]])
    assert result["text"] == Tokenizer(demo_model).decode(result["token_ids"])
    assert result["prompt_tokens"] == len(Tokenizer(demo_model).encode(PROMPTS[1]))
    check_report(result, len(LAYOUTS[layout]))


async def check_logits(pipeline, folder: Path, prompt: list[int]) -> None:
    """The last position's logits are transformers', but for rounding."""
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        theirs = reference(torch.tensor([prompt])).logits[0, -1]
    ours = await Scheduler(pipeline, 512).run(Session(list(prompt)), lambda logits: logits[0].clone())
    assert (ours - theirs).abs().max() <= 1e-4


def check_report(result: dict, n_workers: int) -> None:
    """The JSON has the promised fields, and one message per worker's span and token."""
    assert result["finish_reason"] == ("stop" if result["token_ids"][-1] == 2 else "length")
    assert result["time_to_first_token_s"] > 0
    assert result["prefill_tokens_per_s"] > 0
    assert result["decode_tokens_per_s"] > 0
    assert result["peak_memory_bytes"] > 100e6
    stages = result["stages"]
    assert [stage["first_block"] for stage in stages] == sorted(s["first_block"] for s in stages)
    assert sum(s["last_block"] - s["first_block"] + 1 for s in stages) == 30
    # The prompt, then every token but the last.
    assert {stage["messages"] for stage in stages} == {len(result["token_ids"])}
    assert len({s["node"] for s in stages} - {"master"}) == n_workers
    for stage in stages:
        assert (stage["bytes_sent"] > 0) == (stage["node"] != "master")
        assert stage["bytes_received"] <= stage["bytes_sent"] * 1.1
        assert stage["compute_s"] > 0
        assert (stage["device"], stage["dtype"]) == ("cpu", "float32")


def test_bundles_alone_give_the_same_text(
    processes: Start, cli: Cli, demo_model: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    topology = tmp_path / "topology.yml"
    with socket.socket() as reserved:  # the bundle's topology must name the worker's port
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    topology.write_text(f"pc: {{host: '{address}', layers: [model.layers.5-24]}}")
    split(str(demo_model), topology, tmp_path / "parts")
    worker = ("--mode", "worker", "--model", tmp_path / "parts" / "pc-node", "--address", address)
    processes(*worker, "--dtype", "float32").wait_for("pc serves blocks 5-24")
    master = ("--model", tmp_path / "parts" / "master-node", "--threads", 1, "--raw", "--json", *GREEDY)
    result = answered(cli(*master, "--prompt", PROMPTS[1], "-n", N))
    assert result["token_ids"] == until_stop(expected[PROMPTS[1]])


def test_two_masters_at_once_get_the_text_of_one(
    processes: Start, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    topology, _ = start_workers(processes, tmp_path, "0-14", "15-29")
    common = ("--topology", topology, "--raw", "-n", N, "--json", *GREEDY)
    masters = [processes(*common, "--prompt", prompt) for prompt in PROMPTS[:2]]
    for prompt, master in zip(PROMPTS, masters, strict=False):
        assert json.loads(master.finish()[1])["token_ids"] == until_stop(expected[prompt])


def test_streamed_text_goes_to_stdout_and_the_rest_to_stderr(processes: Start) -> None:
    code, stdout, stderr = processes("--prompt", "Say hello.", "-n", 8, *GREEDY).finish()
    assert code == 0
    assert stdout.startswith("Hello")
    assert "SmolLM2-135M-Instruct: 30 blocks" in stderr
    assert "first after" in stderr
    assert "compute" in stderr


def test_the_same_seed_gives_the_same_text(cli) -> None:
    common = ("--prompt", "Tell me a story.", "-n", 12, "--temperature", "1", "--json", "--threads", 1)
    texts = [cli(*common, "--seed", seed).stdout for seed in (1, 1, 2)]
    first, again, other = (json.loads(text)["token_ids"] for text in texts)
    assert first == again != other


@pytest.mark.parametrize("options", [[], ["--speculate", "ngram"]], ids=["plain", "ngram"])
def test_chat_keeps_the_history_and_answers_every_line(demo_model: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "cake", "--chat", "-n", "16", "--threads", "1", *GREEDY, *options]
    lines = "What is 2+2?\n\nAnd 3+3?\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=True)
    first, second = done.stdout.splitlines()
    chat = [{"role": "system", "content": "You are a helpful AI assistant."}]
    lengths = []
    for question, answer in (("What is 2+2?", first), ("And 3+3?", second)):
        chat.append({"role": "user", "content": question})
        lengths.append(str(len(Tokenizer(demo_model).encode_chat(chat))))
        chat.append({"role": "assistant", "content": answer})
    assert re.findall(r"prompt of (\d+)", done.stderr) == lengths


REPEAT = (
    "Repeat the following text: The quick brown fox jumps over the lazy dog while the sun sets behind the "
    "hills, and the river runs quietly through the valley to the sea."
)


@pytest.mark.parametrize("proposer", ["ngram", "draft"])
def test_proposals_change_the_number_of_passes_only(
    processes: Start, cli: Cli, demo_model: Path, tmp_path: Path, proposer: str
) -> None:
    topology, _ = start_workers(processes, tmp_path, "10-29")
    options = ("--speculate", "ngram") if proposer == "ngram" else ("--draft-model", demo_model)
    common = ("--topology", topology, "--threads", 1, "--prompt", REPEAT, "-n", 24, "--json", *GREEDY)
    plain, guessed = answered(cli(*common)), answered(cli(*common, *options))
    assert (plain["proposed_tokens"], plain["accepted_tokens"]) == (0, 0)
    assert guessed["token_ids"] == plain["token_ids"]
    assert guessed["text"] == plain["text"]
    assert 0 < guessed["accepted_tokens"] <= guessed["proposed_tokens"]
    assert plain["finish_reason"] == "length"  # at an end token, proposals beyond it would not count
    (usual,), (passes,) = ({stage["messages"] for stage in told["stages"]} for told in (plain, guessed))
    assert usual >= len(plain["token_ids"]), "the prompt's chunks, the last of which makes a token"
    assert passes == usual - guessed["accepted_tokens"]
    if proposer == "draft":  # it is the same model
        assert guessed["accepted_tokens"] >= guessed["proposed_tokens"] - 1


def test_a_draft_draws_the_same_text_from_the_same_seed(cli, demo_model: Path) -> None:
    common = ("--prompt", "Tell me a story.", "-n", 24, "--temperature", "0.8", "--json", "--threads", 1)
    common = (*common, "--dtype", "float32")
    plain, ngram, draft = (
        json.loads(cli(*common, *more).stdout)
        for more in ((), ("--speculate", "ngram"), ("--draft-model", demo_model))
    )
    assert plain["token_ids"] == ngram["token_ids"] == draft["token_ids"]
    assert draft["accepted_tokens"] > 0


def test_nodes_quantize_each_as_it_likes(processes: Start, cli: Cli, tmp_path: Path) -> None:
    topology, _ = start_workers(processes, tmp_path, "5-20", quantize="int8")
    common = ("--topology", topology, "--threads", 1, "-n", 16, "--json", *GREEDY)
    question = ("--prompt", "What is the capital of France?")
    for quantize in ("none", "int4"):
        result, again = (answered(cli(*common, *question, "--quantize", quantize)) for _ in range(2))
        here = "bfloat16" if kernels.library() else "float32"
        expected = here if quantize == "none" else quantize
        assert [stage["weights"] for stage in result["stages"]] == [expected, "int8", expected]
        assert "Paris" in result["text"]
        assert again["token_ids"] == result["token_ids"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from /proc")
@pytest.mark.parametrize(("blocks", "dtype"), [("0-29", "float32"), ("3", "bfloat16")])
def test_a_workers_memory_is_its_span_and_torch(
    processes: Start, cli: Cli, demo_model: Path, tmp_path: Path, blocks: str, dtype: str
) -> None:
    topology, (worker,) = start_workers(processes, tmp_path, blocks, dtype=dtype)
    common = ("--topology", topology, "--threads", 1, "-n", 8, "--temperature", 0, "--json")
    answered(cli(*common, "--prompt", "word " * 200))
    of_worker = memory(Path(f"/proc/{worker.process.pid}/status").read_text())
    code = "import torch; print(open('/proc/self/status').read())"
    idle = memory(subprocess.check_output([sys.executable, "-c", code], text=True))
    first, _, last = blocks.partition("-")
    checkpoint = Checkpoint(demo_model)
    wanted = range(int(first), int(last or first) + 1)
    names = [name for name in checkpoint.names() if block_of(name) in wanted]
    stored = sum(entry.end - entry.start for _, entry in map(checkpoint.find, names))  # in bfloat16
    span = stored * (2 if dtype == "float32" else 1)
    assert of_worker["VmHWM"] <= 1.1 * span + idle["VmHWM"]
