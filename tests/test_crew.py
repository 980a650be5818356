"""The crew, looking for a worker that was lost: what a person reads of it."""

import asyncio
import logging
import re

import pytest
from test_connection import soon
from test_remote import EXPECTED, WELCOME, Peer, fake

from cake.crew import Crew, Member
from cake.dialling import Patience
from cake.protocol.messages import Goodbye, Message

REFUSAL, OTHER = Goodbye("I am 'attic'"), Goodbye("no room")


@pytest.mark.parametrize(
    ("replies", "told"),
    [
        ([REFUSAL, REFUSAL], ["refused: I am 'attic'"]),
        ([None], []),
        ([None, REFUSAL, None, REFUSAL, None], ["refused: I am 'attic'"]),
        ([None, None, None], ["hung up during the handshake: .* its log says why"]),
        ([REFUSAL, OTHER, OTHER], ["refused: I am 'attic'", "refused: no room"]),
    ],
)
async def test_what_keeps_a_lost_worker_out_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    replies: list[Message | None],
    told: list[str],
) -> None:
    """`replies` are those to the dials in turn, none for hanging up, as who is about to end does once."""
    monkeypatch.setattr("cake.crew.REDIAL_S", 0.01)
    script, there = [WELCOME, *replies, WELCOME], asyncio.Event()

    async def answer(peer: Peer) -> None:
        await peer.hear()
        reply = script.pop(0)
        if reply is not None:
            peer.say(reply)
        if reply is WELCOME and script:
            await there.wait()
            peer.say(Goodbye("I was stopped"))
        if reply is WELCOME:
            await peer.gone()

    async with fake(answer) as node:
        crew = Crew([Member(node, EXPECTED)], Patience())
        with caplog.at_level(logging.WARNING, "cake.crew"):
            await soon(crew.muster(lambda: False))
            there.set()
            while script or not crew.workers:
                await crew.news.wait(30)
        await soon(crew.close())
    lost, *between, back = (record.getMessage() for record in caplog.records)
    assert "it said goodbye: I was stopped; looking for it" in lost
    assert back == "worker 'porch' is there"
    assert len(between) == len(told)
    for line, pattern in zip(between, told, strict=True):
        assert re.match(f"worker 'porch' at {node.address} {pattern}", line)


async def test_a_worker_that_leaves_as_soon_as_it_has_come_is_looked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    script: list[list[Message]] = [[WELCOME, Goodbye("I was stopped")], [WELCOME]]

    async def answer(peer: Peer) -> None:
        await peer.hear()
        peer.say(*script.pop(0))
        await peer.gone()

    async with fake(answer) as node:
        crew = Crew([Member(node, EXPECTED)], Patience())
        await soon(crew.muster(lambda: False))
        while script or not crew.workers:
            await crew.news.wait(30)
        await soon(crew.close())
    assert not script, "it was dialled again"
    assert [record.getMessage() for record in caplog.records] == ["worker 'porch' is there"]
