#!/usr/bin/env python3
"""Measure prompts over slow links: what each --wire-dtype makes of a link that sets the pace.

    .venv/bin/python scripts/slow_links.py [--rate 50mbit] [--delay 20ms] [--model FOLDER] [--json]

Two workers of one thread on loopback, each behind a relay (scripts/netsim.py). Without --model the model is
as wide as Llama 3.2 1B and nearly empty, so that it waits for its links as a good device would.
"""

import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from cluster import relayed, running_workers
from netsim import bit_rate, duration
from safetensors.torch import save_file

from cake.device import DeviceThread
from cake.dialling import Patience
from cake.model.linear import Placement
from cake.pipeline import Pipeline, open_pipeline
from cake.scheduler import Scheduler
from cake.session import Session
from cake.text import columns, human_bytes
from cake.topology import Topology
from cake.weights.checkpoint import Checkpoint, open_checkpoint

CHOICES = ("float32", "bfloat16", "float16", "int8", None)
THIN = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Prompts:
    """Prompts in one dtype of the wire: tokens per second, and bytes of a prompt, both ways, all links."""

    wire_dtype: str
    first_tokens_per_s: float
    later_tokens_per_s: float
    later_bytes: int


@click.command(help=__doc__)
@click.option("--model", help="Folder or hub id.  [default: a thin one]")
@click.option("--rate", default="50mbit", show_default=True, help="Of each link, each way.")
@click.option("--delay", default="0ms", show_default=True, help="Of each link, each way.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="After the first.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(model: str | None, rate: str, delay: str, prompt_tokens: int, runs: int, as_json: bool) -> None:
    """Run the same prompts with every choice."""
    bit_rate(rate), duration(delay)  # or say what is wrong with them before anything is started
    torch.set_num_threads(1)
    placement = Placement(torch.device("cpu"), torch.float32)
    with slow_workers(model, rate, delay, placement) as (checkpoint, topology):
        found = [
            asyncio.run(measure(checkpoint, topology, placement, choice, prompt_tokens, runs))
            for choice in CHOICES
        ]
    result = {"rate": rate, "delay": delay, "prompt": prompt_tokens, "runs": runs}
    result["prompts"] = [asdict(each) for each in found]
    click.echo(json.dumps(result)) if as_json else click.echo(table(result))


def table(result: dict[str, Any]) -> str:
    """The result for a person."""
    rows = [["--wire-dtype", "first prompt", "later ones", "bytes of one"]]
    rows += [
        [
            each["wire_dtype"],
            f"{each['first_tokens_per_s']:.0f} tokens/s",
            f"{each['later_tokens_per_s']:.0f} tokens/s",
            human_bytes(each["later_bytes"]),
        ]
        for each in result["prompts"]
    ]
    title = f"2 workers behind {result['rate']} and {result['delay']} each way, prompts of {result['prompt']}"
    return "\n".join([f"{title}, median of {result['runs']}:", *columns(rows)])


async def measure(
    checkpoint: Checkpoint,
    topology: Topology,
    placement: Placement,
    choice: str | None,
    n_tokens: int,
    runs: int,
) -> Prompts:
    """A first prompt, whose links are still unknown, and `runs` others."""
    async with pipeline_in(checkpoint, topology, placement, choice, n_tokens) as pipeline:
        speeds, sent = [], [traffic(pipeline)]
        for _ in range(1 + runs):
            speeds.append(await one_prompt(pipeline, n_tokens))
            sent.append(traffic(pipeline))
    return Prompts(choice or "none given", speeds[0], statistics.median(speeds[1:]), sent[-1] - sent[-2])


@contextlib.asynccontextmanager
async def pipeline_in(
    checkpoint: Checkpoint, topology: Topology, placement: Placement, choice: str | None, n_tokens: int
) -> AsyncIterator[Pipeline]:
    """A pipeline for prompts of `n_tokens`, whose hidden states travel in this dtype."""
    thread = DeviceThread(placement, 1)
    pipeline = await open_pipeline(checkpoint, topology, thread, n_tokens + 1, Patience(), wire_dtype=choice)
    try:
        yield pipeline
    finally:
        await pipeline.close()


async def one_prompt(pipeline: Pipeline, n_tokens: int) -> float:
    """Tokens per second until the first logits are there."""
    ids = torch.randint(pipeline.config.vocab_size, (n_tokens,)).tolist()
    session, started = Session(ids), time.perf_counter()
    await Scheduler(pipeline).run(session, lambda logits: None)
    speed = n_tokens / (time.perf_counter() - started)
    await pipeline.forget(session.number)
    return speed


def traffic(pipeline: Pipeline) -> int:
    """Bytes so far."""
    return sum(stage.stats.bytes_sent + stage.stats.bytes_received for stage in pipeline.stages)


@contextlib.contextmanager
def slow_workers(
    model: str | None, rate: str, delay: str, placement: Placement
) -> Iterator[tuple[Checkpoint, Topology]]:
    """Two workers of a model, the thin one if it is None, each behind a slow link."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(model or str(thin_model(Path(scratch))), lambda _: True)
        with (
            running_workers(checkpoint, 2, 1, placement) as workers,
            relayed(workers, rate, delay) as topology,
        ):
            yield checkpoint, topology


def thin_model(folder: Path) -> Path:
    """Write the thin model with random weights."""
    config = THIN
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = (config["head_dim"] * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."
        shapes |= {f"{block}input_layernorm": (hidden,), f"{block}post_attention_layernorm": (hidden,)}
        shapes |= {
            f"{block}self_attn.{name}_proj": (n, hidden) for name, n in (("q", q), ("k", kv), ("v", kv))
        }
        shapes |= {f"{block}self_attn.o_proj": (hidden, q), f"{block}mlp.down_proj": (hidden, inner)}
        shapes |= {f"{block}mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
    shapes["model.norm"] = (hidden,)
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": 0.02 * torch.randn(shape, generator=random) for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
