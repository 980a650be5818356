"""What a worker computes where it arrives, and what has to wait its turn."""

import asyncio
from typing import Any

import pytest

from cake.protocol.frames import Frame
from cake.protocol.messages import Forward, Message, WireSegment, WireTensor
from cake.stage import Answered
from cake.work import Work

HIDDEN = WireTensor("float32", (1, 2), bytes(8))


class QuickStage:
    """Is quick, but when asked to take its time waits until it may go on."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    def is_quick(self, n_tokens: int) -> bool:
        return True

    def answer_at_once(self, *_: object) -> Answered:
        return Answered(HIDDEN, 0.0, 0.0, 0.0)

    async def answer(self, *_: object) -> Answered:
        await self.go_on.wait()
        return self.answer_at_once()


class Master:
    """A connection, as far as work knows one."""

    over, free = False, True

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def post(self, message: Message) -> None:
        self.heard.append(message)

    async def send(self, message: Message) -> None:
        self.heard.append(message)


@pytest.fixture
def master() -> Master:
    return Master()


def forward(number: int) -> Frame:
    return Frame(Forward(number, 0, (WireSegment(7, number, 1, 7),), (), (), HIDDEN), 100)


async def test_what_comes_behind_another_does_not_overtake_it(master: Master) -> None:
    stage = QuickStage()
    work = Work(1, {0: stage}, 2, None, master)  # type: ignore[dict-item, arg-type]
    first, second, third = map(forward, range(3))
    slow = asyncio.create_task(work.forward(first.message, first))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert not work.forward_at_once(second.message, second)  # type: ignore[arg-type]
    stage.go_on.set()
    await slow
    assert work.forward_at_once(third.message, third)  # type: ignore[arg-type]
    assert [result.id for result in master.heard] == [0, 2]


async def test_a_peer_who_reads_slowly_is_waited_for(master: Master) -> None:
    work = Work(1, {0: QuickStage()}, 2, None, master)  # type: ignore[dict-item, arg-type]
    master.free = False
    frame = forward(0)
    assert not work.forward_at_once(frame.message, frame)  # type: ignore[arg-type]
    assert not master.heard
