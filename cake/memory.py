"""How much memory there is, how much this process has held, and how to hold less."""

import ctypes
import gc
import mmap
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from cake.protocol.messages import Memory


def peak_memory_bytes() -> int:
    """The most memory this process has held: resident, and an accelerator's where it has one."""
    accelerator = 0
    if torch.cuda.is_available():
        accelerator = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return _peak_resident_bytes() + accelerator


def memory_of(device: torch.device) -> Callable[[], Memory]:
    """What tells what this process uses of a device's memory at this moment, and all that it has."""
    total = device_memory_bytes(device)
    return lambda: Memory(_used_memory_bytes(device), total)


def _used_memory_bytes(device: torch.device) -> int:
    """Resident memory, or what was taken of an accelerator's."""
    if device.type == "cpu":
        return int(psutil.Process().memory_info().rss)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    used: int = torch.get_device_module(device).memory_reserved(device)
    return used


def device_memory_bytes(device: torch.device) -> int:
    """All memory that a device has; of memory that a GPU shares with the machine, what it may use well."""
    if device.type == "cpu":
        return psutil.virtual_memory().total
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    total: int = torch.get_device_module(device).mem_get_info(device)[1]
    return total


if sys.platform == "win32":

    def _peak_resident_bytes() -> int:
        return int(psutil.Process().memory_info().peak_wset)

else:

    def _peak_resident_bytes() -> int:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def release_code_pages() -> None:
    """Give back the pages of libraries' code that only importing needed; what runs again is mapped again.

    Linux only. They stay in the page cache, so the next call of such code costs a soft page fault. Only
    executable mappings of files: nothing was ever written to them, so nothing can be lost.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, _, inode, *_ = line.split()
        if rights == "r-xp" and inode != "0":
            start, end = (int(address, 16) for address in addresses.split("-"))
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def return_freed_memory() -> None:
    """Give back to the system what is held by nobody: what only cycles hold, and what glibc keeps."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
