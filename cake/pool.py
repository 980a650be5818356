"""Sessions that stay after their answer, so that nothing is computed twice.

A request whose prompt goes on where a kept session ended takes that session over. One that shares only
its beginning with it, a system prompt say, begins as a copy, which every stage makes in its own cache.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from cake.session import Session

KEPT_TOKENS = 1 << 16
KEPT_SESSIONS = 512  # workers hold no more than twice as many
AT_ONCE = 16  # requests; more wait their turn
WORTH_A_COPY = 32  # shared tokens


class SessionPool:
    """Idle sessions, the one used longest ago first; at most `kept_tokens` tokens and 512 of them."""

    def __init__(
        self,
        forget: Callable[[Session], Awaitable[None]],
        kept_tokens: int = KEPT_TOKENS,
        at_once: int = AT_ONCE,
    ) -> None:
        self._forget, self._kept_tokens = forget, kept_tokens
        self._idle: list[Session] = []
        self._copied: Counter[int] = Counter()  # sessions of which a copy is being made: they must stay
        self._turns = asyncio.Semaphore(at_once)  # gives turns in order of arrival
        self.waiting = 0  # for one

    @property
    def idle(self) -> tuple[Session, ...]:
        """The sessions that are kept."""
        return tuple(self._idle)

    @property
    def n_tokens(self) -> int:
        """Of those sessions."""
        return sum(len(session.ids) for session in self._idle)

    @contextlib.asynccontextmanager
    async def session_for(self, prompt: Sequence[int], copies: bool = False) -> AsyncIterator[Session]:
        """Wait for a turn; a session that holds as much of `prompt` as any, kept again afterwards.

        With `copies` the kept ones stay as they are, for others to copy, however little they share.
        """
        async with self._turn():
            session = self._take(prompt, copies)
            source = session.source
            if source is not None:
                self._copied[source] += 1
            try:
                yield session
            finally:
                if source is not None:
                    self._copied[source] -= 1
                self._idle.append(session)
                await self._make_room()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        self.waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._turns.release()

    def _take(self, prompt: Sequence[int], copies: bool) -> Session:
        best = max(self._idle, key=lambda session: session.shared(prompt), default=None)
        shared = best.shared(prompt) if best else 0
        if best is None or shared < (1 if copies else WORTH_A_COPY):
            return Session()
        if not copies and 2 * shared >= best.held and not self._copied[best.number]:
            self._idle.remove(best)
            return best
        self._idle.remove(best)  # it was used
        self._idle.append(best)
        return best.copy(shared)

    async def _make_room(self) -> None:
        while len(self._idle) > KEPT_SESSIONS or self.n_tokens > self._kept_tokens:
            free = [session for session in self._idle if not self._copied[session.number]]
            if not free:
                return
            self._idle.remove(free[0])
            await self._forget(free[0])
