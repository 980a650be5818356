"""Read tensors out of safetensors files, and only those that are asked for.

A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes. The header is
checked in full before any byte is believed, so that damage is named with its offset instead of
becoming a crash later. Tensors are mapped a window at a time and copied into their final place:
mapped pages count as memory of the process, so a whole-file mapping would double a worker's size.

The `safetensors` package is not used for reading because it maps whole files and keeps offsets to
itself; the tests hold this reader against it. Knows nothing of models.
"""

import json
import math
import mmap
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cake.errors import CheckpointError

WINDOW_BYTES = 8 << 20
MAX_HEADER_BYTES = 100 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `start` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One file: its entries by name, and their bytes on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = read_header(path)

    def read_into(self, name: str, destination: Tensor) -> None:
        """Copy the tensor `name` into `destination`, which has its shape; converts dtypes."""
        entry = self.entries[name]
        source_dtype = DTYPES[entry.dtype]
        flat, done = destination.view(-1), 0
        for window in self.windows(entry):
            with warnings.catch_warnings():
                # The mapping is read-only, and so is what is done with it.
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                values = torch.frombuffer(window, dtype=source_dtype)
            flat[done : done + values.numel()].copy_(values)
            done += values.numel()
            del values

    def windows(self, entry: TensorEntry) -> Iterator[memoryview]:
        """The tensor's bytes in read-only pieces of at most `WINDOW_BYTES`, mapped one at a time."""
        with self.path.open("rb") as file:
            for start in range(entry.start, entry.end, WINDOW_BYTES):
                yield _map(file, start, min(start + WINDOW_BYTES, entry.end))

    def bytes_at(self, entry: TensorEntry, start: int, n_bytes: int) -> bytes:
        """`n_bytes` of the tensor from its byte `start` on."""
        with self.path.open("rb") as file:
            file.seek(entry.start + start)
            return file.read(n_bytes)


def _map(file: BinaryIO, start: int, end: int) -> memoryview:
    aligned = start - start % mmap.ALLOCATIONGRANULARITY
    mapping = mmap.mmap(file.fileno(), end - aligned, offset=aligned, access=mmap.ACCESS_READ)
    # The view keeps the mapping alive; both go when the last reader lets go of it.
    return memoryview(mapping)[start - aligned :]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file, by name. Raises `CheckpointError` naming file and offset."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _damaged(path, 0, f"the file has only {size} bytes, too few for a header")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, 0, f"a header of {length} bytes cannot be in {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return _parse_header(path, text, size)


def _parse_header(path: Path, text: bytes, size: int) -> dict[str, TensorEntry]:
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
    except (ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, 8, "the header is not a JSON map") from error
    data_start = 8 + len(text)
    entries = {}
    for name, fields in header.items():
        try:
            entry = _parse_entry(fields, data_start)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, 8, f"the header's entry for {name} is malformed") from error
        if entry.end > size:
            raise _damaged(
                path,
                size,
                f"{name} lies at bytes {entry.start} to {entry.end}; the file is truncated",
            )
        if entry.dtype in DTYPES:
            expected = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
            if expected != entry.end - entry.start:
                raise _damaged(
                    path,
                    entry.start,
                    f"{name} should take {expected} bytes, not {entry.end - entry.start}",
                )
        entries[name] = entry
    return entries


def _parse_entry(fields: Mapping[str, Any], data_start: int) -> TensorEntry:
    shape, (start, end) = tuple(fields["shape"]), fields["data_offsets"]
    numbers = (*shape, start, end)
    if not all(type(n) is int and n >= 0 for n in numbers) or start > end:
        raise ValueError("sizes and offsets must be whole numbers, start before end")
    return TensorEntry(str(fields["dtype"]), shape, data_start + start, data_start + end)


def _damaged(path: Path, offset: int, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged at offset {offset}: {what}; download or copy it again")
