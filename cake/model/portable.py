"""Quantized matrices in torch alone: for accelerators, and for CPUs that Cake's own kernels do not serve.

On a CPU torch's kernels for packed weights multiply. Elsewhere weights are widened in parts, one part
at a time, and multiplied as dense ones: it saves memory, not time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cake.model.linear import Matrix, Placement, TensorSource

GROUP = 32
PART_BYTES = 32 << 20


def portable_matrix(rows: int, columns: int, bits: int, placement: Placement) -> Matrix:
    """An empty quantized matrix that torch alone can multiply with."""
    if placement.device.type == "cpu" and bits == 8:
        return RowScaledMatrix(rows, columns, placement)
    return GroupedMatrix(rows, columns, bits, placement)


class RowScaledMatrix:
    """int8 with one scale per row, in torch's kernel for the CPU, which keeps activations as floats."""

    look_up = native = None

    def __init__(self, rows: int, columns: int, placement: Placement) -> None:
        self._weight = torch.empty((rows, columns), dtype=torch.int8)
        self._scales = torch.empty(rows, dtype=placement.dtype)

    @property
    def numbers(self) -> str:
        """What its weights are kept as."""
        return "int8"

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies."""
        return self._weight.nbytes + self._scales.nbytes

    def fill(self, source: TensorSource, name: str, first_row: int, rows: int) -> None:
        """Quantize while reading."""
        for window in source.windows(name, rows, self._weight.shape[1]):
            part = slice(first_row, first_row + window.shape[0])
            values = window.float()
            # Rounded to the dtype in which they will be multiplied back.
            scales = (values.abs().amax(1) / 127).to(self._scales.dtype)
            self._scales[part] = scales
            wide = scales.float().clamp_min(1e-30)[:, None]
            self._weight[part] = (values / wide).round_().clamp_(-127, 127)
            first_row = part.stop

    def multiply(self, x: Tensor) -> Tensor:
        """`x Wᵀ`."""
        return torch._weight_int8pack_mm(x.contiguous(), self._weight, self._scales)


class GroupedMatrix:
    """int8 or int4 in groups of 32 columns, each with a scale and a lowest value; int4 two to a byte."""

    look_up = native = None

    def __init__(self, rows: int, columns: int, bits: int, placement: Placement) -> None:
        self._bits, self._columns, self._dtype = bits, columns, placement.dtype
        self._groups = -(-columns // GROUP)
        size, device = (rows, self._groups), placement.device
        self._weight = torch.empty((*size, GROUP * bits // 8), dtype=torch.uint8, device=device)
        self._scales = torch.empty((*size, 1), dtype=torch.float16, device=device)
        self._lowest = torch.empty((*size, 1), dtype=torch.float16, device=device)
        self._part = max(1, PART_BYTES // (4 * columns))

    @property
    def numbers(self) -> str:
        """What its weights are kept as."""
        return f"int{self._bits}"

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies."""
        return self._weight.nbytes + self._scales.nbytes + self._lowest.nbytes

    def fill(self, source: TensorSource, name: str, first_row: int, rows: int) -> None:
        """Quantize while reading."""
        most = 2**self._bits - 1
        for window in source.windows(name, rows, self._columns):
            part = slice(first_row, first_row + window.shape[0])
            values = window.to(self._weight.device).float()
            values = F.pad(values, (0, self._groups * GROUP - self._columns))
            values = values.view(-1, self._groups, GROUP)
            # Zero stays within the range, and with it what pads the last group.
            lowest = values.amin(2, keepdim=True).clamp_max_(0).half()
            highest = values.amax(2, keepdim=True).clamp_min_(0)
            scales = ((highest - lowest) / most).half()
            q = ((values - lowest) / scales.float().clamp_min(1e-30)).round_().clamp_(0, most).byte()
            if self._bits == 4:
                low, high = q.chunk(2, 2)
                q = low | high << 4
            self._weight[part], self._scales[part], self._lowest[part] = q, scales, lowest
            first_row = part.stop

    def multiply(self, x: Tensor) -> Tensor:
        """`x Wᵀ`."""
        n_rows = self._weight.shape[0]
        y = x.new_empty((x.shape[0], n_rows))
        for start in range(0, n_rows, self._part):
            part = slice(start, start + self._part)
            y[:, part] = F.linear(x, self._wide(part))
        return y

    def _wide(self, part: slice) -> Tensor:
        """Rows as a dense matrix, `[n, columns]`."""
        q = self._weight[part]
        if self._bits == 4:
            q = torch.cat((q & 15, q >> 4), 2)
        wide = torch.addcmul(self._lowest[part].float(), q.float(), self._scales[part].float())
        return wide.to(self._dtype).flatten(1)[:, : self._columns]
