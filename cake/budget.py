"""How many bytes the caches of a process may take together, and who must go when they are short.

All stages of a process share one budget. A session is evicted from all of them at once, as what is left
of it in one is of no use without the others; its master is told so when it comes back, and runs its
tokens again (rule 2 in `cake.stage`). Bytes are counted before they are allocated, while a cache grows
also those of the old one.

Belongs to the device's thread. Knows nothing of masters, and does not allocate.
"""

import logging
import sys
from collections.abc import Collection, Hashable, Iterable

import torch

from cake.errors import CakeError, SessionLostError, SetupError
from cake.memory import device_memory_bytes
from cake.model.cache import SessionCache, longest_within
from cake.text import human_bytes

log = logging.getLogger(__name__)

SHARE = 0.8  # of the device's memory for weights and caches; the rest is for activations, and for others
LEAST_CONTEXT = 2  # a token of a prompt, and one of the answer

Caches = dict[Hashable, SessionCache]


class CacheBudget:
    """Bytes for caches on `device`: those that were `chosen`, or what the weights leave of 80% of it."""

    def __init__(self, device: torch.device, chosen: int | None = None) -> None:
        self._chosen = chosen
        self._device_bytes = device_memory_bytes(device) if chosen is None else 0
        self._weight_bytes = 0  # of all that is loaded
        self._tables: list[Caches] = []  # of every stage
        self._token_bytes = 0  # in all of them
        self._last_used: dict[Hashable, None] = {}  # sessions, those idle longest first
        self.limit = 0  # bytes that all caches may take together
        self.longest = 0  # tokens that one session can come to hold
        self._settle()

    def add_weights(self, n_bytes: int) -> None:
        """So much more is loaded."""
        self._weight_bytes += n_bytes
        self._settle()

    def new_table(self, token_bytes: int) -> Caches:
        """Where a stage keeps its caches, of which a token takes so many bytes."""
        self._tables.append({})
        self._token_bytes += token_bytes
        self._settle()
        return self._tables[-1]

    def _settle(self) -> None:
        left = max(0, int(SHARE * self._device_bytes) - self._weight_bytes)
        self.limit = left if self._chosen is None else self._chosen
        self.longest = longest_within(self.limit // self._token_bytes) if self._token_bytes else sys.maxsize

    @property
    def used(self) -> int:
        """Bytes that all caches take."""
        return sum(cache.nbytes for table in self._tables for cache in table.values())

    def context(self, wanted: int) -> int:
        """As many of the `wanted` tokens as can be promised to a session. Raises `CakeError` if none can."""
        if self.longest < LEAST_CONTEXT:
            raise CakeError(
                f"{self._words}, too few for a session; give more with --cache-memory, or serve fewer blocks"
            )
        if self.longest < wanted:
            log.warning("%s: a session may hold no more of them (--cache-memory)", self._words)
        return min(wanted, self.longest)

    def check(self, n_tokens: int) -> None:
        """Raise `SetupError` where so many tokens of one session can never be held."""
        if n_tokens > self.longest:
            raise SetupError(f"{self._words}, and the session has {n_tokens}; raise --cache-memory there")

    @property
    def _words(self) -> str:
        return f"the {human_bytes(self.limit)} for caches hold {self.longest} tokens of a session"

    def use(self, sessions: Iterable[Hashable]) -> None:
        """They are not idle."""
        for session in sessions:
            self._last_used.pop(session, None)
            self._last_used[session] = None

    def make_room(self, n_bytes: int, session: Hashable, batch: Collection[Hashable]) -> None:
        """Let `session` take so many bytes more. Who is not in its batch may have to go, idle longest first.

        Where the batch itself takes the room, the session goes: `SessionLostError`.
        """
        short = self.used + n_bytes - self.limit
        idle = [each for each in self._last_used if each not in batch] if short > 0 else []
        if short > sum(map(self._bytes_of, idle)):
            self._evict(session)
            raise SessionLostError(session, 0)
        for each in idle:
            if short <= 0:
                break
            short -= self._bytes_of(each)
            self._evict(each)

    def forgotten(self, session: Hashable) -> None:
        """A stage has freed its cache of the session."""
        if not any(session in table for table in self._tables):
            self._last_used.pop(session, None)

    def _bytes_of(self, session: Hashable) -> int:
        return sum(table[session].nbytes for table in self._tables if session in table)

    def _evict(self, session: Hashable) -> None:
        log.debug("session %s is evicted", session)
        for table in self._tables:
            table.pop(session, None)
        self._last_used.pop(session, None)
