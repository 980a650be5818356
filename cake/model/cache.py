"""The KV cache of one session in one stage: the keys and values of every block of the span.

Rule 2 of the design lives here: a cache is addressed by position. Whoever writes at `position`
declares that everything beyond it is to be forgotten.
"""

import copy

import torch
from torch import Tensor

from cake.errors import SessionLostError
from cake.model.config import ModelConfig

FIRST_CAPACITY = 256


class SessionCache:
    """Keys and values `[n_blocks, 2, n_kv_heads, capacity, head_dim]`, of which `length` are valid.

    Capacity doubles when it is short, up to `context`: a copy never moves more than it adds.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_blocks: int,
        context: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.length = 0
        self._context = context
        shape = (n_blocks, 2, config.n_kv_heads, min(FIRST_CAPACITY, context), config.head_dim)
        self.storage = torch.empty(shape, device=device, dtype=dtype)

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return self.storage.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes that the cache occupies."""
        return self.storage.nbytes

    def copy(self, n_tokens: int) -> "SessionCache":
        """Another cache with the first `n_tokens` of this one, which stays as it is."""
        other = copy.copy(self)
        other.storage = self.storage[..., : max(n_tokens, 1), :].clone()
        other.length = n_tokens
        return other

    def rewind(self, session: object, position: int, n_tokens: int) -> None:
        """Keep the first `position` tokens and make room for `n_tokens` more.

        Raises `SessionLostError` when fewer than `position` tokens are held.
        """
        if position > self.length:
            raise SessionLostError(session, self.length)
        self.length = position
        if position + n_tokens > self.capacity:
            self._grow(position + n_tokens)

    def write(self, block: int, position: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values `[n_tokens, n_kv_heads, head_dim]` of block number `block`.

        Returns all of the block's keys and values up to there, `[n_kv_heads, length, head_dim]`.
        """
        end = position + keys.shape[0]
        all_keys, all_values = self.storage[block]
        all_keys[:, position:end] = keys.transpose(0, 1)
        all_values[:, position:end] = values.transpose(0, 1)
        return all_keys[:, :end], all_values[:, :end]

    def _grow(self, needed: int) -> None:
        capacity = self.capacity
        while capacity < needed:
            capacity *= 2
        old = self.storage
        shape = (*old.shape[:3], min(capacity, self._context), old.shape[4])
        self.storage = torch.empty(shape, device=old.device, dtype=old.dtype)
        self.storage[..., : self.length, :] = old[..., : self.length, :]
