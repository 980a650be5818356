"""Read tensors out of safetensors files, and only those that are asked for.

A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes. The header is
checked in full before any byte is believed, so that damage is named with its offset instead of
becoming a crash later. Bytes are read straight into the tensor's final place: mapping the file would
count its pages as memory of the process a second time, is slower (a page fault for every 4 KiB), and
dies of a signal when the file is cut meanwhile.

The `safetensors` package is not used for reading because it maps whole files and keeps offsets to
itself; the tests hold this reader against it. Knows nothing of models.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cake.errors import CheckpointError

WINDOW_BYTES = 1 << 18  # small, so that what is freed leaves no holes in the heap; whole elements
ROWS_BYTES = 1 << 20
PART_BYTES = 8 << 20
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
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2

    def read_into(self, name: str, destination: Tensor) -> None:
        """Copy the tensor `name` into `destination`, which has its shape; converts dtypes."""
        entry = self.entries[name]
        dtype, flat = DTYPES[entry.dtype], destination.view(-1)
        if flat.device.type == "cpu" and flat.dtype == dtype:
            self._read_in_parts(entry, flat.view(torch.uint8))
            return
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            window = torch.empty(max(1, WINDOW_BYTES // dtype.itemsize), dtype=dtype)
            for part in torch.split(flat, window.numel()):
                self._fill(file, window[: part.numel()])
                part.copy_(window[: part.numel()])

    def _read_in_parts(self, entry: TensorEntry, destination: Tensor) -> None:
        """Into a tensor of bytes, by as many threads as torch computes with: one is busy copying pages."""

        def read(start: int) -> None:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.start + start)
                self._fill(file, destination[start : start + PART_BYTES])

        starts = range(0, destination.numel(), PART_BYTES)
        if len(starts) < 2:
            read(0)
            return
        with ThreadPoolExecutor(torch.get_num_threads(), "reader") as readers:
            list(readers.map(read, starts))

    def rows(self, name: str) -> Iterator[Tensor]:
        """The matrix `name` as stored, some rows at a time, the next ones read meanwhile.

        A piece is a multiple of 16 rows, but at the end; its memory is used again for the next but one.
        """
        entry = self.entries[name]
        n_rows, n_columns = entry.shape
        dtype = DTYPES[entry.dtype]
        row_bytes = n_columns * dtype.itemsize
        at_once = max(1, ROWS_BYTES // max(1, 16 * row_bytes)) * 16
        buffers = [
            buffer[: at_once * row_bytes].view(dtype).view(at_once, n_columns)
            for buffer in self._two_buffers(at_once * row_bytes)
        ]
        pieces = [
            (buffers[i % 2][: min(at_once, n_rows - first)], first)
            for i, first in enumerate(range(0, n_rows, at_once))
        ]
        with self.path.open("rb", buffering=0) as file, ThreadPoolExecutor(1, "reader") as reader:
            file.seek(entry.start)
            reading = reader.submit(self._fill, file, pieces[0][0])
            for i, (piece, _) in enumerate(pieces):
                reading.result()
                if i + 1 < len(pieces):
                    reading = reader.submit(self._fill, file, pieces[i + 1][0])
                yield piece

    def _two_buffers(self, n_bytes: int) -> list[Tensor]:
        """Kept from one matrix to the next: what is freed between two weights leaves holes in the heap."""
        if self._buffers[0].numel() < n_bytes:
            self._buffers = [torch.empty(n_bytes, dtype=torch.uint8) for _ in range(2)]
        return self._buffers

    def windows(self, entry: TensorEntry) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of at most `WINDOW_BYTES`; each is gone with the next."""
        window = torch.empty(WINDOW_BYTES, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            for start in range(entry.start, entry.end, WINDOW_BYTES):
                part = window[: min(WINDOW_BYTES, entry.end - start)]
                self._fill(file, part)
                yield part.numpy().data

    def bytes_at(self, entry: TensorEntry, start: int, n_bytes: int) -> bytes:
        """`n_bytes` of the tensor from its byte `start` on, fewer at its end."""
        with self.path.open("rb") as file:
            file.seek(entry.start + start)
            return file.read(min(n_bytes, entry.end - entry.start - start))

    def _fill(self, file: FileIO, tensor: Tensor) -> None:
        """Read straight into the memory of a contiguous CPU tensor."""
        rest = tensor.view(torch.uint8).numpy().data
        while rest:
            n_bytes = file.readinto(rest)
            if not n_bytes:
                raise _damaged(self.path, file.tell(), "the file was cut while it was read")
            rest = rest[n_bytes:]


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
        header = dict(json.loads(text).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, 8, "the header is not a JSON map") from error
    data_start = 8 + len(text)
    entries = {}
    header.pop("__metadata__", None)
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
