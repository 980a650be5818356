"""What loading takes in seconds and memory, and what it costs to let torch's products and ours take turns."""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from trial import Bench, Outcome

from cake.device import DeviceThread, available_cores
from cake.kernels import library
from cake.model.cache import bytes_per_token
from cake.model.linear import Linear, Placement
from cake.text import human_bytes
from cake.weights.checkpoint import Checkpoint, block_of

N_TOKENS = 1024
BITS = {"int8": 8.25, "int4": 4.5}  # a weight, with its share of a byte for its group's scale, and zero
SECONDS_PER_GB = {"none": 2 / 2.5, "int8": 10 / 2.5, "int4": 10 / 2.5}


async def loading(bench: Bench) -> Outcome:
    """Seconds to load all weights from the page cache, as a share of what is allowed."""
    took = statistics.median(run["seconds"] for run in _fresh_processes(bench))
    size = sum(map(bench.checkpoint.bytes_of, (None, *range(bench.checkpoint.config.n_blocks))))
    allowed = SECONDS_PER_GB[bench.placement.quantize] * size / 1e9
    measured = f"{took:.2f} s for {human_bytes(size)}, {human_bytes(size / took)}/s"
    return Outcome("loading, seconds", measured, took, allowed, at_most=True)


async def resident(bench: Bench) -> Outcome:
    """Memory that a stage of all blocks came to hold, by what its weights and its cache need."""
    config, placement = bench.checkpoint.config, bench.placement
    held = statistics.median(run["held_bytes"] for run in _fresh_processes(bench))
    cache = N_TOKENS * bytes_per_token(config, config.n_blocks, placement.dtype)
    weights = _needed_bytes(bench.checkpoint, placement)
    measured = f"{human_bytes(held)}; weights {human_bytes(weights)}, cache {human_bytes(cache)}"
    return Outcome(
        "a stage's memory, by what it needs", measured, held / (weights + cache), 1.1, at_most=True
    )


def _fresh_processes(bench: Bench) -> list[dict[str, float]]:
    """What each run's own process tells; one before them brings the files into the page cache."""
    command = [sys.executable, str(Path(__file__).with_name("loading_process.py"))]
    command += [str(bench.checkpoint.folder), "--threads", str(available_cores()), "--tokens", str(N_TOKENS)]
    command += ["--dtype", str(bench.placement.dtype).removeprefix("torch.")]
    command += ["--quantize", bench.placement.quantize]
    said = [subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout for _ in range(bench.runs + 1)]
    return [json.loads(text) for text in said[1:]]


def _needed_bytes(checkpoint: Checkpoint, placement: Placement) -> float:
    """Bytes of the blocks' weights, as the checkpoint's shapes and the bits per weight have it."""
    total = 0.0
    for name in checkpoint.names():
        if block_of(name) is None:
            continue
        entry = checkpoint.find(name)[1]
        stored = 8 * checkpoint.dtype_of(name).itemsize
        bits = BITS.get(placement.quantize, stored) if len(entry.shape) == 2 else stored
        total += math.prod(entry.shape) * bits / 8
    return total


async def alternating(bench: Bench) -> Outcome:
    """Native and torch's products in turn, by the time that each takes on its own."""
    if library() is None:
        return Outcome("native and torch's products in turn", "no native kernels here", math.nan, 1.1, True)
    placement = Placement(torch.device("cpu"), torch.float32, "int8")
    thread = DeviceThread(placement, available_cores())
    try:
        ours, theirs, both = await thread.run(_turns, bench.checkpoint, placement, bench.runs)
    finally:
        thread.close()
    measured = f"{1e6 * ours:.0f} µs and {1e6 * theirs:.0f} µs alone, {1e6 * both:.0f} µs in turn"
    return Outcome("native and torch's products in turn", measured, both / (ours + theirs), 1.1, at_most=True)


def _turns(checkpoint: Checkpoint, placement: Placement, runs: int, n: int = 200) -> tuple[float, ...]:
    """Seconds of a native product, of one of torch's, and of both when they take turns; medians."""
    config = checkpoint.config
    sizes = config.intermediate_size, config.hidden_size
    name = "model.layers.0.mlp.up_proj"
    native = Linear.load(checkpoint, [(name, sizes[0])], sizes[1], placement)
    dense, x = torch.randn(sizes), torch.randn(4, sizes[1])

    def ours() -> None:
        native(x)

    def theirs() -> None:
        torch.nn.functional.linear(x, dense)

    works: list[list[Callable[[], None]]] = [[ours], [theirs], [ours, theirs]]
    rounds = [[_seconds(work, n) for work in works] for _ in range(runs + 1)][1:]
    return tuple(statistics.median(column) for column in zip(*rounds, strict=True))


def _seconds(work: list[Callable[[], None]], n: int) -> float:
    started = time.perf_counter()
    for _ in range(n):
        for call in work:
            call()
    return (time.perf_counter() - started) / n
