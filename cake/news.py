"""Word that something has changed, for tasks that wait for it, and for who has to know at once."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator


class News:
    """What is told reaches those who wait now; who comes later waits for the next."""

    def __init__(self) -> None:
        self._told = asyncio.Event()
        self._hearers: list[Callable[[], object]] = []

    def tell(self) -> None:
        """Wake all who wait."""
        told, self._told = self._told, asyncio.Event()
        told.set()
        for hear in self._hearers:
            hear()

    @contextlib.contextmanager
    def heard_by(self, hear: Callable[[], object]) -> Iterator[None]:
        """Meanwhile call this as soon as there is news."""
        self._hearers.append(hear)
        try:
            yield
        finally:
            self._hearers.remove(hear)

    async def wait(self, timeout: float) -> None:
        """Until there is news, at most `timeout` seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._told.wait(), timeout)
