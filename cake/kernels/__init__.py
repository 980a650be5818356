"""Cake's own CPU kernels: finding the compiled library, and the instruction set it computes with.

The library is built at installation where there is a C compiler (`setup.py`). Where there is none,
`library()` is none and torch's kernels serve. Knows nothing of models.
"""

import ctypes
import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, set to the best instruction set; none where they cannot serve."""
    built = [Path(__file__).with_name(f"_matrix{suffix}") for suffix in EXTENSION_SUFFIXES]
    files = [path for path in built if path.exists()]
    if not files:
        return None
    try:
        kernels = ctypes.CDLL(str(files[0]))
    except OSError:  # built for another machine
        return None
    kernels.cake_set_name.restype = ctypes.c_char_p
    kernels.cake_multiply.argtypes = [POINTER, POINTER, SIZE, SIZE, POINTER, ctypes.c_int, SIZE]
    kernels.cake_fresh_memory.argtypes = [POINTER, ctypes.c_size_t, SIZE]
    kernels.cake_quantize.argtypes = [POINTER, POINTER, ctypes.c_int, SIZE, SIZE, SIZE, SIZE]
    kernels.cake_block.argtypes = [POINTER, SIZE, POINTER, SIZE, POINTER, POINTER, POINTER, SIZE, SIZE]
    kernels.cake_set_threads(*_entries_of_torchs_openmp())
    best = kernels.cake_set_name(0)
    if best is None:
        return None
    kernels.cake_use(best)
    return kernels


def instruction_sets() -> list[str]:
    """The instruction sets that this CPU and the kernels have in common, best first."""
    kernels = library()
    if kernels is None:
        return []
    names: list[str] = []
    while name := kernels.cake_set_name(len(names)):
        names.append(name.decode())
    return names


@functools.cache
def cpu_computes_bfloat16() -> bool:
    """Whether torch's matrix products in bfloat16 have instructions of their own (else they are emulated)."""
    return _torch_has("avx512_bf16") or _torch_has("amx_tile")


def _torch_has(feature: str) -> bool:
    has: bool = getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()
    return has


def _entries_of_torchs_openmp() -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """`GOMP_parallel` and `GOMP_barrier` of the OpenMP that torch loaded; null where it has none.

    Both of its common runtimes, GNU's and LLVM's, have these entries. Threads of a second runtime would
    spin against torch's for the same cores.
    """
    folder = Path(torch.__file__).parent / "lib"
    candidates = [str(path) for path in [*folder.glob("libgomp*"), *folder.glob("lib*omp*.dylib")]]
    for name in (*candidates, None):
        try:
            runtime = ctypes.CDLL(name)
            entries = (runtime.GOMP_parallel, runtime.GOMP_barrier)
        except (OSError, AttributeError, TypeError):
            continue
        return ctypes.cast(entries[0], ctypes.c_void_p), ctypes.cast(entries[1], ctypes.c_void_p)
    return ctypes.c_void_p(None), ctypes.c_void_p(None)
