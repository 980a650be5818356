"""Tasks are ended, those too that do not heed the first word."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from cake.tasks import end, merged


async def forgetful(times: int) -> None:
    """Goes on as often as it is cancelled."""
    for _ in range(times):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    await asyncio.Event().wait()


async def broken() -> None:
    raise ValueError


async def test_tasks_end_that_forget_that_they_were_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cake.tasks.AGAIN_S", 0.01)
    tasks = [asyncio.create_task(forgetful(times)) for times in range(3)]
    await asyncio.sleep(0)
    await end(tasks)
    assert [task.cancelled() for task in tasks] == [True] * 3


async def test_it_does_not_matter_how_they_ended_or_whether_there_are_any() -> None:
    task = asyncio.create_task(broken())
    await asyncio.wait([task])
    await end([task])
    assert not task.cancelled()
    await end([])


async def letters(text: str) -> AsyncGenerator[str, None]:
    for letter in text:
        await asyncio.sleep(0)
        yield letter


async def test_what_generators_yield_comes_with_their_numbers() -> None:
    heard = [each async for each in merged([letters("abc"), letters(""), letters("xy")])]
    assert [letter for number, letter in heard if number == 0] == ["a", "b", "c"]
    assert [letter for number, letter in heard if number == 2] == ["x", "y"]
    assert len(heard) == 5


async def test_one_generators_error_ends_the_others() -> None:
    closed = []

    async def endless() -> AsyncGenerator[str, None]:
        try:
            while True:
                await asyncio.sleep(0)
                yield "again"
        finally:
            closed.append(True)

    async def broken() -> AsyncGenerator[str, None]:
        yield "once"
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        async for _ in merged([endless(), broken()]):
            pass
    assert closed == [True]
