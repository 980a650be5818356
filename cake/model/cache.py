"""The KV cache of one session in one stage: the keys and values of every block of the span.

Rule 2 of the design lives here: a cache is addressed by position. Whoever writes at `position`
declares that everything beyond it is to be forgotten.
"""

import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from cake.errors import SessionLostError
from cake.model.config import ModelConfig

FIRST_CAPACITY = 256


def capacity_for(n_tokens: int, longest: int) -> int:
    """Tokens to make room for where `n_tokens` need it: a power of two times 256, at most `longest`.

    So capacity doubles when it is short, and a copy never moves more than it adds.
    """
    capacity = FIRST_CAPACITY
    while capacity < n_tokens:
        capacity *= 2
    return min(capacity, longest)


def longest_within(n_tokens: int) -> int:
    """How many tokens a cache can come to hold in memory for `n_tokens`: while it grows it is there twice."""
    capacity = FIRST_CAPACITY
    while 3 * capacity <= n_tokens:
        capacity *= 2
    return max(min(capacity, n_tokens), n_tokens - capacity)


def bytes_per_token(config: ModelConfig, n_blocks: int, dtype: torch.dtype) -> int:
    """Bytes that a cache takes for a token of its capacity."""
    return n_blocks * 2 * config.n_kv_heads * config.head_dim * dtype.itemsize


class SessionCache:
    """Keys and values `[n_blocks, 2, n_kv_heads, capacity, head_dim]`, of which `length` are valid."""

    def __init__(
        self,
        config: ModelConfig,
        n_blocks: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.length = 0
        shape = (n_blocks, 2, config.n_kv_heads, capacity, config.head_dim)
        self.storage = _allocate(shape, device, dtype)

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return self.storage.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes that the cache occupies."""
        return self.storage.nbytes

    def grow(self, capacity: int) -> None:
        """Make room for so many tokens, in other memory: both are there until the old one is copied."""
        old = self.storage
        self.storage = _allocate((*old.shape[:3], capacity, old.shape[4]), old.device, old.dtype)
        self.storage[..., : self.length, :] = old[..., : self.length, :]

    def take_over(self, source: "SessionCache", n_tokens: int) -> None:
        """Become a copy of the first `n_tokens` of another cache, for which there is room."""
        self.storage[..., :n_tokens, :] = source.storage[..., :n_tokens, :]
        self.length = n_tokens

    def rewind(self, session: object, position: int) -> None:
        """Keep the first `position` tokens. Raises `SessionLostError` when fewer are held."""
        if position > self.length:
            raise SessionLostError(session, self.length)
        self.length = position

    def write(self, block: int, position: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values `[n_tokens, n_kv_heads, head_dim]` of block number `block`.

        Returns all of the block's keys and values up to there, `[n_kv_heads, length, head_dim]`.
        """
        end = position + keys.shape[0]
        all_keys, all_values = self.storage[block]
        all_keys[:, position:end] = keys.transpose(0, 1)
        all_values[:, position:end] = values.transpose(0, 1)
        return all_keys[:, :end], all_values[:, :end]


def _allocate(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor whose memory goes back to the system when it is freed.

    On a CPU malloc would keep it, in pieces between which the next ones do not fit: after many sessions a
    process would hold more than its caches ever took together.
    """
    if device.type != "cpu":
        return torch.empty(tuple(shape), device=device, dtype=dtype)
    n_bytes = math.prod(shape) * dtype.itemsize
    if sys.platform == "win32":
        pages = mmap.mmap(-1, n_bytes)
    else:
        pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)
