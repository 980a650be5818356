"""Rotary position embedding, with the frequency scaling of Llama 3.1.

Sources: Su et al., RoFormer (arXiv:2104.09864); The Llama 3 Herd of Models (arXiv:2407.21783), whose
scaling keeps high frequencies, divides low ones by `factor`, and blends in between.

The tables are computed by numpy: a worker that serves a few blocks would otherwise map 3 MiB of torch's
code for these few functions alone.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from cake.model.config import RopeConfig

FIRST_POSITIONS = 256

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of channels, `[head_dim / 2]`, float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(rope.theta) ** exponents
    if rope.type == "linear":
        frequencies /= np.float32(rope.factor)
    elif rope.type == "llama3":
        frequencies = _llama3(frequencies, rope)
    return torch.from_numpy(frequencies)


def _llama3(frequencies: Floats, rope: RopeConfig) -> Floats:
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_context / wavelengths  # rotations within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    return blended.astype(np.float32)


class RopeTable:
    """Cosines and sines of every position that was asked for so far.

    It doubles when it is short, as the sessions' caches do: a table for the whole context would be
    more memory than a short session's cache.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim)
        self._device, self._dtype = device, dtype
        self._fill(FIRST_POSITIONS)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each `[n_tokens, 1, head_dim]`, for positions `[n_tokens]` on the CPU."""
        cos, sin = self.up_to(int(positions.max()) + 1)
        positions = positions.to(self._device)
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)

    def up_to(self, n_positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the positions from 0, `[n, head_dim]` with n at least `n_positions`."""
        if n_positions > len(self._cos):
            self._fill(max(n_positions, 2 * len(self._cos)))
        return self._cos, self._sin

    def _fill(self, n_positions: int) -> None:
        angles = np.arange(n_positions, dtype=np.float32)[:, None] * self._frequencies.numpy()
        angles = np.concatenate((angles, angles), axis=-1)  # [n_positions, head_dim]
        self._cos = torch.from_numpy(np.cos(angles)).to(self._device, self._dtype)
        self._sin = torch.from_numpy(np.sin(angles)).to(self._device, self._dtype)


@functools.lru_cache(maxsize=2)
def rope_table(rope: RopeConfig, head_dim: int, device: torch.device, dtype: torch.dtype) -> RopeTable:
    """The table for these sizes; all spans of a process share one."""
    return RopeTable(rope, head_dim, device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x` `[n_tokens, n_heads, head_dim]` by its position; channel i pairs with i + half."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
