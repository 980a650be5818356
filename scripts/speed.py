"""Prompt and generation speed of a model, here and over workers on loopback, and llama.cpp's beside it.

`bench.py` calls this.
"""

import asyncio
import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from cluster import running_workers
from machine import read_bandwidth
from peer import Peer, running_llama_cpp
from peer_cluster import best, running_llama_cpp_rpc
from quality import measure_quality, quality_lines
from round_trip import HIDDEN_SIZE, echo_worker, measure_round_trips
from trial import GREEDY

from cake.device import DeviceThread, available_cores
from cake.dialling import Patience
from cake.generator import Generator
from cake.model.linear import Placement
from cake.model.tokenizer import Tokenizer
from cake.pipeline import Pipeline, open_pipeline
from cake.remote import RemoteStage
from cake.session import Session
from cake.text import columns, human_bytes
from cake.topology import Topology
from cake.weights.checkpoint import Checkpoint


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


@dataclass(frozen=True)
class Wanted:
    """Which figures to measure: over how many workers, with how many threads, beside whom."""

    sizes: Lengths
    workers: int
    threads: int  # of the local run
    worker_threads: int | None  # None is an equal share of the cores
    round_trips: int
    quality_tokens: int | None  # None where quality is not asked for
    peer_python: str | None  # who has llama-cpp-python; None where it is not asked for
    peer_type: str
    peer_rpc: bool = False  # beside the workers too


def measure_figures(checkpoint: Checkpoint, placement: Placement, wanted: Wanted) -> dict[str, Any]:
    """All that is wanted, for a machine to read."""
    with echo_worker() as port:
        round_trip = asyncio.run(measure_round_trips(port, wanted.round_trips))
    local, peer = measure_here(checkpoint, placement, wanted)
    spread, rpc = measure_over_workers(checkpoint, placement, wanted) if wanted.workers else (None, None)
    speeds = [local, *([spread] if spread else [])]
    result = {
        **asdict(wanted.sizes),
        "read_bytes_per_s": round(read_bandwidth(wanted.threads)),
        "round_trip_us": round_trip,
        "speeds": [asdict(speed) for speed in speeds],
        "llama_cpp": asdict(peer) if peer else None,
        "ours_by_llama_cpp": ratio(local, peer) if peer else None,
        "llama_cpp_rpc": asdict(rpc) if rpc else None,
        "ours_by_llama_cpp_rpc": ratio(spread, rpc) if spread and rpc else None,
        "quality": None,
    }
    if wanted.quality_tokens:
        result["quality"] = asyncio.run(measure_quality(checkpoint, wanted.quality_tokens, wanted.threads))
    return result


def figure_lines(result: dict[str, Any]) -> list[str]:
    """The same for a person."""
    trip = result["round_trip_us"]
    rows = [["", "prompt", "generation", "network per message"]]
    rows += [
        [
            speed["setup"],
            f"{speed['prompt_tokens_per_s']:.1f} tokens/s",
            f"{speed['generation_tokens_per_s']:.1f} tokens/s",
            f"{speed['network_us_per_message']:.0f} µs",
        ]
        for speed in filter(None, [*result["speeds"], result["llama_cpp"], result["llama_cpp_rpc"]])
    ]
    for what, ratios in (
        ("local / llama.cpp", result["ours_by_llama_cpp"]),
        ("workers / llama.cpp RPC", result["ours_by_llama_cpp_rpc"]),
    ):
        if ratios:
            rows.append([what, *(f"{ratios[name]:.2f}" for name in ("prompt", "generation")), ""])
    return [
        f"round trip of {HIDDEN_SIZE} channels in bfloat16 over loopback, medians: "
        + ", ".join(f"{name} {times['median']:.0f} µs" for name, times in trip.items()),
        f"read bandwidth: {human_bytes(result['read_bytes_per_s'])}/s",
        f"prompt of {result['prompt']}, {result['generate']} generated, median of {result['runs']}:",
        *columns(rows),
        *(["", *quality_lines(result["quality"])] if result["quality"] else []),
    ]


def measure_here(checkpoint: Checkpoint, placement: Placement, wanted: Wanted) -> tuple[Speed, Speed | None]:
    """The speed without workers and, if it is wanted, llama.cpp's; their runs take turns."""
    sizes, threads = wanted.sizes, wanted.threads
    if wanted.peer_python is None:
        return asyncio.run(measure(checkpoint, Topology({}), placement, threads, sizes)), None
    work = (wanted.peer_type, threads, sizes.prompt, sizes.generate)
    with running_llama_cpp(wanted.peer_python, checkpoint, *work) as peer:
        local = asyncio.run(measure(checkpoint, Topology({}), placement, threads, sizes, peer.run))
    return local, Speed(peer.name, *peer.medians(), 0.0)


def measure_over_workers(
    checkpoint: Checkpoint, placement: Placement, wanted: Wanted
) -> tuple[Speed, Speed | None]:
    """The speed over worker processes on loopback and, if it is wanted, llama.cpp's; in turns too."""
    sizes, share = wanted.sizes, wanted.worker_threads or max(1, available_cores() // wanted.workers)
    with contextlib.ExitStack() as stack:
        peers: list[Peer] = []
        if wanted.peer_python and wanted.peer_rpc:
            work = (wanted.peer_type, wanted.workers, sizes.prompt, sizes.generate)
            peers = stack.enter_context(running_llama_cpp_rpc(wanted.peer_python, checkpoint, *work))

        def others() -> None:
            for peer in peers:
                peer.run()

        topology = stack.enter_context(running_workers(checkpoint, wanted.workers, share, placement))
        spread = asyncio.run(measure(checkpoint, topology, placement, share, sizes, others))
        rpc = (
            Speed(f"llama.cpp over {wanted.workers} RPC workers, its best", *best(peers), 0.0)
            if peers
            else None
        )
    return spread, rpc


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
            await asyncio.to_thread(after_run)  # workers must go on hearing that this side is alive
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
