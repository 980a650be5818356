"""Linear layers, the kernel of each, and the door through which weights enter the mathematics.

Several projections that read the same input (q, k and v; gate and up) become one matrix whose rows
stand below one another: one multiplication instead of three. Which kernel multiplies is chosen once,
when a matrix is made: `new_matrix` is the table.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cake import kernels
from cake.kernels.matrix import NativeMatrix

Quantization = Literal["none", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}


class TensorSource(Protocol):
    """Where weights come from; a checkpoint is one."""

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which the tensor called `name` is stored."""

    def read_into(self, name: str, destination: Tensor) -> None:
        """Fill `destination` with the tensor called `name`, converted to its dtype and device."""

    def windows(self, name: str, rows: int, columns: int) -> Iterator[Tensor]:
        """The matrix called `name` as stored, some rows at a time; a window's memory is soon used again."""


@dataclass(frozen=True)
class Placement:
    """Where a stage's tensors live, in what numbers they are computed, and how weights are kept."""

    device: torch.device
    dtype: torch.dtype
    quantize: Quantization = "none"

    def read(self, source: TensorSource, name: str, *shape: int) -> Tensor:
        """A new tensor of this placement with the values of `name`."""
        tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
        source.read_into(name, tensor)
        return tensor


class Matrix(Protocol):
    """A weight `[rows, columns]` in whatever form its kernel wants."""

    @property
    def numbers(self) -> str:
        """What its weights are kept as: a dtype's name, `int8` or `int4`."""

    @property
    def look_up(self) -> Callable[[Tensor], Tensor] | None:
        """Its rows of these numbers, `[n]` to `[n, columns]`, where weights are kept as they were stored."""

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies."""

    @property
    def native(self) -> NativeMatrix | None:
        """The form that Cake's own kernels take, where it is kept so."""

    def fill(self, source: TensorSource, name: str, first_row: int, rows: int) -> None:
        """Take over the tensor called `name` `[rows, columns]` as rows from `first_row` on."""

    def multiply(self, x: Tensor) -> Tensor:
        """`x Wᵀ`, from `[n_tokens, columns]` to `[n_tokens, rows]`, in the dtype of `x`."""


class Linear:
    """`y = x Wᵀ + b`."""

    def __init__(self, matrix: Matrix, bias: Tensor | None = None) -> None:
        self.matrix, self.bias = matrix, bias

    @property
    def nbytes(self) -> int:
        """Bytes that its matrix occupies."""
        return self.matrix.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """From `[n_tokens, columns]` to `[n_tokens, rows]`."""
        y = self.matrix.multiply(x)
        return y if self.bias is None else y.add_(self.bias)

    @classmethod
    def load(
        cls,
        source: TensorSource,
        parts: Sequence[tuple[str, int]],
        columns: int,
        placement: Placement,
        bias: bool = False,
    ) -> "Linear":
        """Read the named parts, each `(name, rows)`, below one another into one layer."""
        rows = sum(n for _, n in parts)
        stored = {source.dtype_of(f"{name}.weight") for name, _ in parts}
        matrix = new_matrix(rows, columns, placement, stored)
        offsets = torch.empty(rows, device=placement.device, dtype=placement.dtype) if bias else None
        start = 0
        for name, n in parts:
            matrix.fill(source, f"{name}.weight", start, n)
            if offsets is not None:
                source.read_into(f"{name}.bias", offsets[start : start + n])
            start += n
        return cls(matrix, offsets)


def new_matrix(rows: int, columns: int, placement: Placement, stored: set[torch.dtype]) -> Matrix:
    """An empty matrix in the form that is fastest here; `stored` are its parts' dtypes in the checkpoint.

    The table of kernels. What each costs is measured by scripts/bench.py.
    """
    native = placement.device.type == "cpu" and kernels.library() is not None
    if placement.quantize != "none":
        bits = BITS[placement.quantize]
        if native:
            return KernelMatrix(rows, columns, bits)
        from cake.model.portable import portable_matrix  # which needs this module

        return portable_matrix(rows, columns, bits, placement)
    kept = stored if placement.dtype == torch.float32 else {placement.dtype}
    if native and kept == {torch.bfloat16}:
        return KernelMatrix(rows, columns, 16)
    return DenseMatrix(rows, columns, placement)


class DenseMatrix:
    """A plain tensor, multiplied by torch."""

    native = None

    def __init__(self, rows: int, columns: int, placement: Placement) -> None:
        self._weight = torch.empty((rows, columns), device=placement.device, dtype=placement.dtype)

    @property
    def numbers(self) -> str:
        """What its weights are kept as."""
        return str(self._weight.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies."""
        return self._weight.nbytes

    def fill(self, source: TensorSource, name: str, first_row: int, rows: int) -> None:
        """Read straight into place."""
        source.read_into(name, self._weight[first_row : first_row + rows])

    def look_up(self, rows: Tensor) -> Tensor:
        """From `[n]` to `[n, columns]`."""
        return F.embedding(rows, self._weight)

    def multiply(self, x: Tensor) -> Tensor:
        """`x Wᵀ`."""
        return F.linear(x, self._weight)


class KernelMatrix:
    """In Cake's own CPU kernels, which multiply in float32 or, where activations are bfloat16, in that.

    16 bits are bfloat16: where it was stored so, the same numbers. For int8 and int4, activations are rounded
    to int8 in groups of 32.
    """

    def __init__(self, rows: int, columns: int, bits: int) -> None:
        self.native = NativeMatrix(rows, columns, bits)

    @property
    def numbers(self) -> str:
        """What its weights are kept as."""
        return "bfloat16" if self.native.bits == 16 else f"int{self.native.bits}"

    @property
    def look_up(self) -> Callable[[Tensor], Tensor] | None:
        """From `[n]` to `[n, columns]`, bfloat16."""
        return self.native.look_up if self.native.bits == 16 else None

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies."""
        return self.native.nbytes

    def fill(self, source: TensorSource, name: str, first_row: int, rows: int) -> None:
        """Convert while reading."""
        for window in source.windows(name, rows, self.native.columns):
            self.native.fill(first_row, window)
            first_row += window.shape[0]

    def multiply(self, x: Tensor) -> Tensor:
        """`x Wᵀ`."""
        rounds = x.dtype == torch.bfloat16  # it is rounded already
        return self.native.multiply(x.float().contiguous(), rounds).to(x.dtype)
