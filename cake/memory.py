"""How much memory this process has held."""

import sys

import torch


def peak_memory_bytes() -> int:
    """The most memory this process has held: resident, and an accelerator's where it has one."""
    accelerator = 0
    if torch.cuda.is_available():
        accelerator = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return _peak_resident_bytes() + accelerator


if sys.platform == "win32":

    def _peak_resident_bytes() -> int:
        import psutil

        return int(psutil.Process().memory_info().peak_wset)

else:

    def _peak_resident_bytes() -> int:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
