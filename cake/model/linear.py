"""Linear layers, and the door through which weights enter the mathematics.

Several projections that read the same input (q, k and v; gate and up) become one matrix whose rows
stand below one another: one multiplication instead of three.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class TensorSource(Protocol):
    """Where weights come from; a checkpoint is one."""

    def read_into(self, name: str, destination: Tensor) -> None:
        """Fill `destination` with the tensor called `name`, converted to its dtype and device."""


@dataclass(frozen=True)
class Placement:
    """Where a stage's tensors live, and in what numbers they are computed."""

    device: torch.device
    dtype: torch.dtype

    def read(self, source: TensorSource, name: str, *shape: int) -> Tensor:
        """A new tensor of this placement with the values of `name`."""
        tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
        source.read_into(name, tensor)
        return tensor


class Linear:
    """`y = x Wᵀ + b` with a weight of `[rows, columns]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """From `[n_tokens, columns]` to `[n_tokens, rows]`."""
        return F.linear(x, self.weight, self.bias)

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
        weight = torch.empty((rows, columns), device=placement.device, dtype=placement.dtype)
        offsets = torch.empty(rows, device=placement.device, dtype=placement.dtype) if bias else None
        start = 0
        for name, n in parts:
            source.read_into(f"{name}.weight", weight[start : start + n])
            if offsets is not None:
                source.read_into(f"{name}.bias", offsets[start : start + n])
            start += n
        return cls(weight, offsets)
