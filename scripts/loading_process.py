"""One process that loads a model's blocks and ends, runs a prompt, and says what both took.

`loading.py` starts this afresh for each run: memory that an earlier load left behind would blur it. A JSON
object goes to stdout.
"""

import argparse
import asyncio
import gc
import json
import time
from typing import get_args

import psutil
import torch

from cake.device import DeviceThread
from cake.memory import return_freed_memory
from cake.model.batch import Batch, Segment
from cake.model.linear import Placement, Quantization
from cake.model.llama import load_ends
from cake.protocol.tensors import DTYPES
from cake.stage import LocalStage
from cake.weights.checkpoint import Checkpoint, open_checkpoint


def main() -> None:
    """Load what the arguments name, and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=list(DTYPES), required=True)
    parser.add_argument("--quantize", choices=get_args(Quantization), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model, lambda _: True)
    placement = Placement(torch.device("cpu"), DTYPES[args.dtype], args.quantize)
    thread = DeviceThread(placement, args.threads)
    try:
        print(json.dumps(asyncio.run(load_and_run(checkpoint, placement, thread, args.tokens))))
    finally:
        thread.close()


async def load_and_run(
    checkpoint: Checkpoint, placement: Placement, thread: DeviceThread, n_tokens: int
) -> dict[str, float]:
    """Seconds to load everything, and bytes that the stage of all blocks came to hold."""
    config = checkpoint.config
    stage = LocalStage("here", range(config.n_blocks), config, n_tokens, thread)
    await thread.run(torch.ones, 1)  # the thread's own start belongs to no stage
    gc.collect()
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    await thread.run(stage.load, checkpoint)
    stage_s = time.perf_counter() - started
    hidden = torch.randn(n_tokens, config.hidden_size, dtype=placement.dtype)
    chunk = 256
    for first in range(0, n_tokens, chunk):
        rows = hidden[first : first + chunk]
        await stage.forward(Batch(rows, (Segment(b"one", first, len(rows)),)))
    return_freed_memory()
    held = psutil.Process().memory_info().rss - before - hidden.nbytes
    started = time.perf_counter()
    await thread.run(load_ends, checkpoint, config, placement)
    return {"seconds": stage_s + time.perf_counter() - started, "held_bytes": held}


if __name__ == "__main__":
    main()
