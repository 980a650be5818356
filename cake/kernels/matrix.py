"""A matrix that Cake's own CPU kernels multiply with: quantized, or bfloat16 as it was stored."""

import ctypes

import torch
from torch import Tensor

from cake.kernels import POINTER, SIZE, library

TILE_ROWS, GROUP, PAIR = 16, 32, 2
ONE_IS_ENOUGH = 1 << 20  # products of a weight and an activation below which threads do not pay


class _Layout(ctypes.Structure):
    """`struct matrix` of matrix.c."""

    _fields_ = (
        ("weights", POINTER),
        ("scales", POINTER),
        ("row_scales", POINTER),
        ("rows", SIZE),
        ("columns", SIZE),
        ("bits", SIZE),
    )


class NativeMatrix:
    """`[rows, columns]` in 4, 8 or 16 bits a weight, filled row by row from tensors."""

    def __init__(self, rows: int, columns: int, bits: int) -> None:
        kernels = library()
        assert kernels is not None, "whoever chooses this kernel has asked whether it is there"
        self._kernels = kernels
        self.rows, self.columns, self.bits = rows, columns, bits
        padded_rows = _round_up(rows, TILE_ROWS)
        width = _round_up(columns, PAIR if bits == 16 else GROUP)
        n_groups = 0 if bits == 16 else padded_rows * width // GROUP
        self._weights = torch.empty(padded_rows * width * bits // 8, dtype=torch.uint8)
        self._scales = torch.empty(n_groups * (2 if bits == 4 else 1), dtype=torch.uint8)
        self._row_scales = torch.empty(padded_rows if n_groups else 0)
        kernels.cake_fresh_memory(self._weights.data_ptr(), self._weights.nbytes, torch.get_num_threads())
        if padded_rows > rows:  # what no row fills is multiplied all the same
            for part in (self._weights, self._scales, self._row_scales):
                part.zero_()
        pointers = (part.data_ptr() for part in (self._weights, self._scales, self._row_scales))
        self._layout = _Layout(*pointers, rows, width, bits)
        self.address = ctypes.addressof(self._layout)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and their scales."""
        return sum(part.nbytes for part in (self._weights, self._scales, self._row_scales))

    def look_up(self, rows: Tensor) -> Tensor:
        """Some rows `[n]` of a matrix of 16 bits, as they were: bfloat16 `[n, columns]`."""
        tiles = self._weights.view(torch.bfloat16).view(-1, self._layout.columns // PAIR, TILE_ROWS, PAIR)
        found = tiles[rows // TILE_ROWS, :, rows % TILE_ROWS]
        return found.reshape(len(rows), -1)[:, : self.columns]

    def fill(self, first_row: int, source: Tensor) -> None:
        """Fill the rows from `first_row` with those of `source` `[n, columns]`, of any dtype."""
        if source.dtype not in (torch.float32, torch.bfloat16):
            source = source.float()
        is_bfloat, n = int(source.dtype == torch.bfloat16), source.shape[0]
        # Laying out is sooner done than threads have come together, which then spin where others read.
        threads = 1 if self.bits == 16 else torch.get_num_threads()
        self._kernels.cake_quantize(
            self.address, source.data_ptr(), is_bfloat, first_row, n, self.columns, threads
        )

    def multiply(self, x: Tensor, rounds: bool = False) -> Tensor:
        """From contiguous float32 `[n_tokens, columns]` to `[n_tokens, rows]`.

        `rounds` allows a matrix of 16 bits to round them to bfloat16, which some processors multiply faster.
        """
        n_tokens = x.shape[0]
        y = torch.empty((n_tokens, self.rows))
        small = n_tokens * self.rows * self.columns < ONE_IS_ENOUGH
        threads = 1 if small else torch.get_num_threads()
        done = self._kernels.cake_multiply(
            self.address, x.data_ptr(), self.columns, n_tokens, y.data_ptr(), rounds, threads
        )
        if not done:
            raise MemoryError("no memory for the activations of a batch")
        return y


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
