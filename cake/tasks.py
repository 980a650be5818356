"""How tasks that nobody needs any more are ended. Knows nothing of what they do."""

import asyncio
from collections.abc import Iterable
from typing import Any

AGAIN_S = 1.0


async def end(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Cancel tasks, and wait until they have ended, however they do.

    More than once where that is needed: before Python 3.12, `asyncio.wait_for` forgets that it was
    cancelled when what it waits for comes at the same moment, and a loop around it goes on for ever.
    """
    ending = tuple(tasks)
    running = set(ending)
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=AGAIN_S)
    for task in ending:
        if not task.cancelled():
            task.exception()  # nobody else looks at it
