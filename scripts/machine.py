"""What a measurement depends on beside the code: this machine."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from cake.device import available_cores
from cake.kernels import instruction_sets


def machine() -> dict[str, Any]:
    """Its processor, memory and system, and what computes on it."""
    return {
        "processor": processor(),
        "cores": available_cores(),
        "instructions": next(iter(instruction_sets()), None),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """Its name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
