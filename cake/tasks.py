"""Tasks beside one another, and how those are ended that nobody needs. Knows nothing of what they do."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

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


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """What several generators yield, each with its number, as it comes; they run beside one another.

    Each waits until what it yielded was taken. The first error of one ends all.
    """
    arrived: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(1)

    async def drain(number: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for each in stream:
                    await arrived.put((number, each))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    tasks = [asyncio.create_task(drain(i, stream)) for i, stream in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            each = await arrived.get()
            if isinstance(each, BaseException):
                raise each
            if each is None:
                running -= 1
            else:
                yield each
    finally:
        await end(tasks)
