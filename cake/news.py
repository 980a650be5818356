"""Word that something has changed, for any number of tasks that wait for it."""

import asyncio
import contextlib


class News:
    """What is told reaches those who wait now; who comes later waits for the next."""

    def __init__(self) -> None:
        self._told = asyncio.Event()

    def tell(self) -> None:
        """Wake all who wait."""
        told, self._told = self._told, asyncio.Event()
        told.set()

    async def wait(self, timeout: float) -> None:
        """Until there is news, at most `timeout` seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._told.wait(), timeout)
