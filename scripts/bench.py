#!/usr/bin/env python3
"""Measure Cake: frame round trip, prompt and generation speed, locally and over workers.

    .venv/bin/python scripts/bench.py [--model FOLDER] [--workers 2] [--quality] [--llama-cpp] [--json]

Workers are real processes on loopback. Each speed is the median of several runs, after one that is
not counted; a table or, with --json, one JSON object goes to stdout.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch
from cluster import running_workers
from peer import check_python, running_llama_cpp
from quality import measure_quality, quality_lines
from round_trip import HIDDEN_SIZE, echo_worker, measure_round_trips
from scenarios import SCENARIOS, Bench, run_scenarios, scenario_lines

from cake.device import DeviceThread, available_cores, choose_dtype
from cake.generator import Generator
from cake.model.linear import Placement, Quantization
from cake.model.sampling import SamplingParams
from cake.model.tokenizer import Tokenizer
from cake.pipeline import Pipeline, open_pipeline
from cake.remote import Patience, RemoteStage
from cake.session import Session
from cake.text import columns, human_bytes
from cake.topology import Topology
from cake.weights.checkpoint import Checkpoint, open_checkpoint

GREEDY = SamplingParams(temperature=0, repeat_penalty=1)


@dataclass(frozen=True)
class Speed:
    """Medians of one set-up; tokens per second, and what the network added per token and stage."""

    setup: str
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    network_us_per_message: float


@dataclass(frozen=True)
class Lengths:
    """How much to run: tokens of the prompt, tokens to generate, counted runs."""

    prompt: int
    generate: int
    runs: int


@click.command(help=__doc__)
@click.option("--model", help="Folder or hub id.  [default: the demo model]")
@click.option("--workers", type=click.IntRange(min=0), default=2, show_default=True)
@click.option("--prompt-tokens", "prompt", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--generate-tokens", "generate", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Of the local run.  [default: all cores]")
@click.option("--worker-threads", type=click.IntRange(min=1), help="[default: an equal share of the cores]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: as cake-cli]")
@click.option("--quantize", type=click.Choice(["none", "int8", "int4"]), default="none", show_default=True)
@click.option("--round-trips", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option(
    "--quality",
    "with_quality",
    is_flag=True,
    help="Add what fewer bits cost in quality, of weights and on the wire.",
)
@click.option(
    "--quality-tokens", type=click.IntRange(min=512), default=8192, show_default=True, help="Tokens scored."
)
@click.option("--llama-cpp", "with_llama_cpp", is_flag=True, help="Add llama.cpp's speed, run by run.")
@click.option(
    "--llama-python",
    type=click.Path(exists=True, dir_okay=False),
    help="A Python that has llama-cpp-python.  [default: this one]",
)
@click.option(
    "--scenario",
    "names",
    type=click.Choice([*SCENARIOS, "all"]),
    multiple=True,
    help="Run these instead: many requests, long prompts, slow links.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def bench(
    model: str | None,
    workers: int,
    threads: int | None,
    worker_threads: int | None,
    dtype: str | None,
    quantize: Quantization,
    round_trips: int,
    with_quality: bool,
    quality_tokens: int,
    with_llama_cpp: bool,
    llama_python: str | None,
    names: tuple[str, ...],
    as_json: bool,
    **lengths: int,
) -> None:
    """Run the scenarios one after another."""
    sizes = Lengths(**lengths)
    peer_python = (llama_python or sys.executable) if with_llama_cpp else None
    if peer_python:
        check_python(peer_python)
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(model, lambda _: True)
    local_threads = threads or available_cores()
    cpu = torch.device("cpu")
    placement = Placement(cpu, choose_dtype(dtype, checkpoint.config.dtype, cpu), quantize)
    if names:
        chosen = list(SCENARIOS) if "all" in names else names
        outcomes = run_scenarios(chosen, Bench(checkpoint, placement, sizes.runs))
        as_text = "\n".join(scenario_lines(outcomes))
        click.echo(json.dumps([asdict(outcome) for outcome in outcomes]) if as_json else as_text)
        return
    with echo_worker() as port:
        round_trip = asyncio.run(measure_round_trips(port, round_trips))
    local, peer = measure_here(checkpoint, placement, local_threads, sizes, peer_python)
    speeds = [local]
    if workers:
        share = worker_threads or max(1, available_cores() // workers)
        with running_workers(checkpoint, workers, share, placement) as topology:
            speeds.append(asyncio.run(measure(checkpoint, topology, placement, share, sizes)))
    result = {
        "model": checkpoint.name,
        "dtype": str(placement.dtype).removeprefix("torch."),
        "quantize": quantize,
        **asdict(sizes),
        "read_bytes_per_s": round(read_bandwidth(local_threads)),
        "round_trip_us": round_trip,
        "speeds": [asdict(speed) for speed in speeds],
        "llama_cpp": asdict(peer) if peer else None,
        "ours_by_llama_cpp": ratio(local, peer) if peer else None,
        "quality": None,
    }
    if with_quality:
        result["quality"] = asyncio.run(measure_quality(checkpoint, quality_tokens, local_threads))
    click.echo(json.dumps(result)) if as_json else click.echo(table(result))


def table(result: dict[str, Any]) -> str:
    """The result for a person."""
    trip = result["round_trip_us"]
    rows = [["", "prompt", "generation", "network per message"]]
    rows += [
        [
            speed["setup"],
            f"{speed['prompt_tokens_per_s']:.1f} tokens/s",
            f"{speed['generation_tokens_per_s']:.1f} tokens/s",
            f"{speed['network_us_per_message']:.0f} µs",
        ]
        for speed in [*result["speeds"], *filter(None, [result["llama_cpp"]])]
    ]
    if ratios := result["ours_by_llama_cpp"]:
        rows.append(["local / llama.cpp", *(f"{ratios[name]:.2f}" for name in ("prompt", "generation")), ""])
    return "\n".join(
        [
            f"round trip of {HIDDEN_SIZE} channels in bfloat16 over loopback, medians: "
            + ", ".join(f"{name} {times['median']:.0f} µs" for name, times in trip.items()),
            f"read bandwidth: {human_bytes(result['read_bytes_per_s'])}/s",
            f"{result['model']} in {result['dtype']}, quantize {result['quantize']}, "
            f"prompt of {result['prompt']}, {result['generate']} generated, median of {result['runs']}:",
            *columns(rows),
            *(["", *quality_lines(result["quality"])] if result["quality"] else []),
        ]
    )


# A real model, here or over workers.


def measure_here(
    checkpoint: Checkpoint, placement: Placement, threads: int, sizes: Lengths, peer_python: str | None
) -> tuple[Speed, Speed | None]:
    """The speed without workers and, given a Python that has it, llama.cpp's; their runs take turns."""
    if peer_python is None:
        return asyncio.run(measure(checkpoint, Topology({}), placement, threads, sizes)), None
    work = (placement.quantize, threads, sizes.prompt, sizes.generate)
    with running_llama_cpp(peer_python, checkpoint, *work) as peer:
        local = asyncio.run(measure(checkpoint, Topology({}), placement, threads, sizes, peer.run))
    return local, Speed(peer.name, *peer.medians(), 0.0)


def ratio(ours: Speed, theirs: Speed) -> dict[str, float]:
    """How many times as fast ours is."""
    return {
        "prompt": ours.prompt_tokens_per_s / theirs.prompt_tokens_per_s,
        "generation": ours.generation_tokens_per_s / theirs.generation_tokens_per_s,
    }


async def measure(
    checkpoint: Checkpoint,
    topology: Topology,
    placement: Placement,
    threads: int,
    sizes: Lengths,
    after_run: Callable[[], object] = lambda: None,
) -> Speed:
    """Run the prompt and the generation of `sizes` over a topology."""
    thread = DeviceThread(placement, threads)
    context = min(checkpoint.config.context, sizes.prompt + sizes.generate)
    pipeline = await open_pipeline(checkpoint, topology, thread, context, Patience())
    try:
        generator = Generator(pipeline, Tokenizer(checkpoint.folder), frozenset())
        runs = []
        for _ in range(sizes.runs + 1):
            runs.append(await one_run(generator, sizes))
            after_run()
    finally:
        await pipeline.close()
    setup = f"{len(topology.nodes)} workers" if topology.nodes else "local"
    return Speed(
        f"{setup}, {threads} thread{'s' * (threads > 1)}{' each' * bool(topology.nodes)}",
        statistics.median(prompt for prompt, _ in runs[1:]),
        statistics.median(generation for _, generation in runs[1:]),
        network_us_per_message(pipeline),
    )


async def one_run(generator: Generator, sizes: Lengths) -> tuple[float, float]:
    """Tokens per second of the prompt and of the generation."""
    random = torch.Generator().manual_seed(0)
    vocab_size = generator.pipeline.config.vocab_size
    prompt = torch.randint(vocab_size, (sizes.prompt,), generator=random).tolist()
    session = Session()
    pieces = generator.generate(session, prompt, GREEDY, sizes.generate)
    moments = [time.perf_counter()] + [time.perf_counter() async for _ in pieces]
    await generator.close_session(session)
    first, last = moments[1] - moments[0], moments[-1] - moments[1]
    return sizes.prompt / first, (sizes.generate - 1) / last


def network_us_per_message(pipeline: Pipeline) -> float:
    """What a message to a worker cost beyond the worker's computing, on average."""
    remote = [stage.stats for stage in pipeline.stages if isinstance(stage, RemoteStage)]
    messages = sum(stats.messages for stats in remote)
    return 1e6 * sum(stats.network_s for stats in remote) / messages if messages else 0.0


def read_bandwidth(threads: int) -> float:
    """Bytes per second at which this machine reads memory, best of several sums over 1 GB."""
    torch.set_num_threads(threads)
    data = torch.ones(250_000_000)
    return data.nbytes / min(timed(data.sum) for _ in range(7))


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    bench()
