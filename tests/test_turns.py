"""Turns: who waits where not all sessions find room, and that somebody always goes on."""

import asyncio

import pytest
from test_scheduler import Gate, generate, last, settle

from cake.errors import SessionLostError
from cake.scheduler import Scheduler
from cake.session import Session


async def test_a_session_lost_twice_beside_another_waits_until_that_is_over() -> None:
    gate = Gate(1)
    scheduler, lost, other = Scheduler(gate), Session([1, 2]), Session([7, 8])
    first = asyncio.create_task(scheduler.run(lost, last))
    second = asyncio.create_task(generate(scheduler, other, 3))
    await gate.let(SessionLostError(lost.number, 0))
    await gate.let(SessionLostError(lost.number, 0))
    late = asyncio.create_task(scheduler.run(Session([30]), last))
    for _ in range(3):
        assert [s.session for s in await gate.let()] == [other.number], "nor does who comes now push it aside"
    assert second.result() == [7, 8, 9, 10, 11]
    assert [s.session for s in await gate.let()] == [lost.number]
    await gate.let()
    assert (first.result(), late.result()) == (2, 30)


async def test_who_leaves_makes_room_for_who_waits() -> None:
    gate = Gate(1)
    scheduler, lost, other = Scheduler(gate), Session([1, 2]), Session([7, 8])
    first = asyncio.create_task(scheduler.run(lost, last))
    second = asyncio.create_task(scheduler.run(other, last))
    await gate.let(SessionLostError(lost.number, 0))
    await gate.let(SessionLostError(lost.number, 0))
    await settle()
    second.cancel()
    await gate.let()
    await gate.let()
    assert first.result() == 2


async def test_who_is_driven_out_again_and_again_while_it_generates_waits_too() -> None:
    gate = Gate(1)
    scheduler, lost, other = Scheduler(gate), Session([1]), Session([50])
    first = asyncio.create_task(generate(scheduler, lost, 3))
    second = asyncio.create_task(generate(scheduler, other, 5))
    await gate.let()
    await gate.let(SessionLostError(lost.number, 0))
    await gate.let()
    assert (len(lost.ids), len(other.ids)) == (3, 3)
    await gate.let(SessionLostError(lost.number, 0))
    while not second.done():
        assert [s.session for s in await gate.let()] == [other.number]
    await gate.let()
    assert first.result() == [1, 2, 3, 4]


async def test_a_mistake_of_our_own_reaches_who_waited_for_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(1)
    scheduler, lost, other = Scheduler(gate), Session([1, 2]), Session([7, 8])
    first = asyncio.create_task(scheduler.run(lost, last))
    second = asyncio.create_task(scheduler.run(other, last))
    await gate.let(SessionLostError(lost.number, 0))
    await gate.let(SessionLostError(lost.number, 0))

    def mistake(*arguments: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(scheduler, "_chunk_for", mistake)
    await gate.let()
    assert await second == 8
    with pytest.raises(RuntimeError, match="a mistake"):
        await asyncio.wait_for(first, 1)
