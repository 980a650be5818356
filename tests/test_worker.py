"""The worker: what a master gets from it, and that nobody's nonsense reaches another master."""

import asyncio
import contextlib
import logging
import re
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENT, serving
from msgspec import structs
from test_connection import soon
from test_remote import Peer

from cake.chain import Chain
from cake.dialling import connect_worker
from cake.errors import SessionLostError
from cake.model.batch import Batch, Segment
from cake.pipeline import expectation
from cake.protocol.messages import (
    VERSION,
    Failed,
    Forget,
    Forward,
    Goodbye,
    Hello,
    Lost,
    Message,
    Result,
    Welcome,
    WireSegment,
    WireTensor,
)
from cake.protocol.tensors import from_wire, to_wire
from cake.remote import RemoteStage
from cake.stage import LocalStage
from cake.topology import Node
from cake.visit import Service
from cake.weights.checkpoint import Checkpoint
from cake.worker import Worker

SPAN = range(0, 3)
HELLO = Hello(VERSION, "test", "porch", "")


def states(n_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_tokens, 64, generator=torch.Generator().manual_seed(seed))


def zeros(*shape: int) -> WireTensor:
    return to_wire(torch.zeros(shape))


def forward(*segments: tuple[int, int, int], first: int = 0, hidden: WireTensor | None = None) -> Forward:
    """A forward whose tensor fits its segments, unless another is given."""
    n_tokens = sum(length for _, _, length in segments)
    wire_segments = tuple(WireSegment(*s, s[0]) for s in segments)
    return Forward(5, first, wire_segments, (), (), hidden or zeros(n_tokens, 64))


def prefix(header: int, payload: int) -> bytes:
    return struct.pack(">4sIQ", b"CAKE", header, payload)


async def ask(peer: Peer, message: Message) -> Message:
    peer.say(message)
    return await peer.hear()


@asynccontextmanager
async def raw(node: Node, *first: Message) -> AsyncIterator[Peer]:
    """A socket to the worker, with a welcome heard if it begins with a hello."""
    master = Peer(*await asyncio.open_connection(node.host, node.port))
    try:
        if first:
            assert isinstance(await ask(master, *first), Welcome)
        yield master
    finally:
        master.writer.close()
        await asyncio.gather(master.writer.wait_closed(), return_exceptions=True)


@asynccontextmanager
async def master_of(folder: Path, node: Node) -> AsyncIterator[Chain]:
    """A good master's connection to the worker."""
    worker = await connect_worker(node, expectation(Checkpoint(folder), node), PATIENT)
    try:
        yield Chain([RemoteStage(worker, node.spans[0])])
    finally:
        await worker.close()


async def run(stage: Chain | LocalStage, session: int, position: int, hidden: torch.Tensor) -> torch.Tensor:
    return (await soon(stage.forward(Batch(hidden, (Segment(session, position, len(hidden)),))))).hidden


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@asynccontextmanager
async def between_good_masters(folder: Path, here: LocalStage) -> AsyncIterator[Node]:
    """What happens inside is noticed neither by a master from before nor by one from after."""
    prompt, token = states(6), states(1, seed=1)
    expected = [await run(here, 0, 0, prompt), await run(here, 0, 6, token)]
    async with serving(folder, "porch", SPAN) as node, master_of(folder, node) as before:
        got = [await run(before, 0, 0, prompt)]
        yield node
        got.append(await run(before, 0, 6, token))
        async with master_of(folder, node) as after:
            got += [await run(after, 0, 0, prompt), await run(after, 0, 6, token)]
    for actual, right in zip(got, expected * 2, strict=True):
        assert torch.equal(actual, right)


@pytest.mark.parametrize("first", [[], [HELLO]], ids=["connected", "greeted"])
@pytest.mark.parametrize("way", ["close", "abort", "half-close"])
async def test_a_master_that_leaves_without_a_word(
    tiny_model: Path, here: LocalStage, caplog: pytest.LogCaptureFixture, first: list[Message], way: str
) -> None:
    async with between_good_masters(tiny_model, here) as node, raw(node, *first) as master:
        if way == "half-close":
            master.writer.write_eof()
            assert await master.hear_all() == []
        elif way == "abort":
            master.writer.transport.abort()
    assert warnings(caplog) == []


async def test_a_hello_whose_master_is_gone(tiny_model: Path, here: LocalStage, caplog) -> None:
    async with between_good_masters(tiny_model, here) as node, raw(node) as master:
        master.say(HELLO)
    assert warnings(caplog) == []


async def test_a_master_that_takes_leave_while_it_waits_for_a_result(
    tiny_model: Path, here: LocalStage, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C in mid-forward is nothing wrong."""
    async with between_good_masters(tiny_model, here) as node, raw(node, HELLO) as master:
        master.say(forward((0, 0, 400)), Goodbye("the master is done"))
        assert not any(isinstance(message, Goodbye) for message in await master.hear_all())
    assert warnings(caplog) == []


async def test_no_hello_in_time(tiny_model: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("cake.visit.HANDSHAKE_S", 0.05)
    async with serving(tiny_model, "porch", SPAN) as node, raw(node) as master:
        assert await master.hear_all() == [Goodbye("no hello within 0.05 s")]
    assert "turned away: no hello within 0.05 s" in warnings(caplog)[0]


async def test_the_welcome(tiny_model: Path) -> None:
    checkpoint = Checkpoint(tiny_model)
    async with serving(tiny_model, "porch", range(0, 2), range(4, 5)) as node, raw(node) as master:
        welcome = await ask(master, HELLO)
    assert isinstance(welcome, Welcome)
    assert (welcome.version, welcome.node, welcome.model) == (VERSION, "porch", checkpoint.config.fingerprint)
    marks = [checkpoint.span_fingerprint(span) for span in (range(0, 2), range(4, 5))]
    assert list(welcome.spans) == [(0, 1, marks[0]), (4, 4, marks[1])]
    assert (welcome.device, welcome.dtype, welcome.context) == ("cpu", "float32", 512)
    assert welcome.max_batch_tokens == 2048


async def test_what_cannot_be_done_is_answered_and_the_connection_goes_on(
    tiny_model: Path, here: LocalStage, caplog: pytest.LogCaptureFixture
) -> None:
    hidden = states(6)
    expected = await run(here, 0, 0, hidden)
    async with serving(tiny_model, "porch", SPAN) as node, raw(node, HELLO) as master:
        assert await ask(master, forward((7, 1, 1))) == Lost(5, 7, 0)
        first = await ask(master, forward((7, 0, 4), hidden=to_wire(hidden[:4])))
        assert await ask(master, forward((7, 5, 1))) == Lost(5, 7, 4)
        for position in (512, 2**64 - 1):
            failed = await ask(master, forward((7, position, 1)))
            assert isinstance(failed, Failed)
            assert f"{position + 1} tokens do not fit into the context of 512" in failed.reason
        second = await ask(master, forward((7, 4, 2), hidden=to_wire(hidden[4:])))
        master.say(Forget((7, 12345)))
        assert await ask(master, forward((7, 6, 1))) == Lost(5, 7, 0)
    got = torch.cat([from_wire(first.hidden), from_wire(second.hidden)])
    assert torch.allclose(got, expected, atol=1e-4)
    assert first.id == second.id == 5
    assert warnings(caplog) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
async def test_the_answer_has_the_dtype_of_the_question(
    tiny_model: Path, here: LocalStage, dtype: str
) -> None:
    sent = to_wire(states(6), dtype)
    sent = WireTensor(dtype, sent.shape, bytearray(sent.data))
    expected = await run(here, 0, 0, from_wire(sent).float())
    async with serving(tiny_model, "porch", SPAN) as node, raw(node, HELLO) as master:
        result = await ask(master, forward((7, 0, 6), hidden=sent))
    assert isinstance(result, Result)
    assert (result.hidden.dtype, result.hidden.shape) == (dtype, (6, 64))
    assert bytes(result.hidden.data) == bytes(to_wire(expected, dtype).data)


async def test_int8_that_names_channels_beyond_the_row(tiny_model: Path) -> None:
    sent = to_wire(states(1), "int8")
    sent = WireTensor("int8", sent.shape, bytearray(b"\xff" * len(sent.data)))
    async with serving(tiny_model, "porch", SPAN) as node, raw(node, HELLO) as master:
        assert await ask(master, forward((7, 0, 1), hidden=sent)) == Failed(
            5, "a tensor names channels beyond its 64"
        )
        assert isinstance(await ask(master, forward((7, 0, 1))), Result)


async def test_what_torch_raises_is_answered(tiny_model: Path, monkeypatch, caplog) -> None:
    async def out_of_memory(self: LocalStage, *_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate\n  8 GiB")

    async with serving(tiny_model, "porch", SPAN) as node, raw(node, HELLO) as master:
        with monkeypatch.context() as patch:
            patch.setattr(LocalStage, "answer", out_of_memory)
            assert await ask(master, forward((0, 0, 1))) == Failed(5, "tried to allocate 8 GiB")
        assert isinstance(await ask(master, forward((0, 0, 1))), Result)
    assert warnings(caplog) == ["a forward failed"]


@pytest.mark.parametrize("way", ["goodbye", "half-close", "abort", "nonsense"])
async def test_the_sessions_of_a_master_that_leaves_are_freed(
    tiny_model: Path, monkeypatch, way: str
) -> None:
    def recorded(service: Service, *allowed: Any) -> Worker:
        services.append(service)
        return Worker(service, *allowed)

    async def forget(self: LocalStage, sessions) -> None:
        await original(self, sessions)
        forgotten.set()

    services: list[Service] = []
    original, forgotten = LocalStage.forget, asyncio.Event()
    monkeypatch.setattr("conftest.Worker", recorded)
    monkeypatch.setattr(LocalStage, "forget", forget)
    async with (
        serving(tiny_model, "porch", SPAN) as node,
        raw(node, HELLO) as stays,
        raw(node, HELLO) as master,
    ):
        stage = services[0].stages[0]
        for who, session in ((master, 1), (master, 2), (stays, 1)):
            assert isinstance(await ask(who, forward((session, 0, 2))), Result)
        assert stage.n_sessions == 3
        leave = {
            "goodbye": lambda: master.say(Goodbye("done")),
            "half-close": master.writer.write_eof,
            "abort": master.writer.transport.abort,
            "nonsense": lambda: master.writer.write(b"nonsense"),
        }
        leave[way]()
        await soon(forgotten.wait())
        assert stage.n_sessions == 1
        assert isinstance(await ask(stays, forward((1, 2, 1))), Result)
    assert stage.n_sessions == 0


async def test_what_comes_over_a_link_for_a_master_that_leaves_is_not_kept(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forget(self: LocalStage, sessions) -> None:
        if sessions:  # the master's, of whom the link has none
            stages.append(self)
            leaving.set()
            await gone.wait()
        await original(self, sessions)

    stages: list[LocalStage] = []
    original, leaving, gone = LocalStage.forget, asyncio.Event(), asyncio.Event()
    monkeypatch.setattr(LocalStage, "forget", forget)
    async with serving(tiny_model, "porch", SPAN) as node, raw(node) as master:
        welcome = await ask(master, HELLO)
        assert isinstance(welcome, Welcome)
        async with raw(node, structs.replace(HELLO, visit=welcome.visit)) as worker:
            assert isinstance(await ask(master, forward((7, 0, 2))), Result)
            master.say(forward((7, 2, 3), hidden=zeros(1, 64)))  # nonsense, while the other goes on
            await soon(leaving.wait())
            worker.say(forward((8, 0, 2)), Goodbye("that was all"))
            await worker.hear_all()
            gone.set()
            await master.hear_all()
        assert stages[0].n_sessions == 0


async def test_two_masters_with_the_same_session_numbers(tiny_model: Path, here: LocalStage) -> None:
    async with (
        serving(tiny_model, "porch", SPAN) as node,
        master_of(tiny_model, node) as one,
        master_of(tiny_model, node) as two,
    ):
        for position, n_tokens in ((0, 8), (8, 1), (9, 3), (5, 2)):
            inputs = [states(n_tokens, seed=position), states(n_tokens, seed=100 + position)]
            got = await asyncio.gather(run(one, 0, position, inputs[0]), run(two, 0, position, inputs[1]))
            assert torch.equal(got[0], await run(here, 1, position, inputs[0]))
            assert torch.equal(got[1], await run(here, 2, position, inputs[1]))
        await one.stages[0].forget([0])
        with pytest.raises(SessionLostError):
            await run(one, 0, 7, states(1))
        assert torch.equal(await run(two, 0, 7, states(1)), await run(here, 2, 7, states(1)))


async def test_close_says_goodbye_to_every_master(tiny_model: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with serving(tiny_model, "porch", SPAN) as node:
            masters = [await stack.enter_async_context(raw(node, HELLO)) for _ in range(2)]
        for master in masters:
            assert await master.hear_all() == [Goodbye("the test is over")]
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(node.host, node.port)


async def test_the_report_of_rates(tiny_model: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    async def sleep(seconds: float) -> None:
        assert seconds == 5
        asleep.set()
        await awake.wait()
        awake.clear()

    async def reports() -> list[str]:
        """What is reported when the next five seconds are over."""
        await soon(asleep.wait())
        asleep.clear()
        awake.set()
        await soon(asleep.wait())
        lines = [message for message in caplog.messages if "operations/s" in message]
        caplog.clear()
        return lines

    asleep, awake = asyncio.Event(), asyncio.Event()
    monkeypatch.setattr("cake.worker.asyncio.sleep", sleep)
    caplog.set_level(logging.INFO, "cake.worker")
    async with serving(tiny_model, "porch", SPAN) as node, raw(node, HELLO) as master:
        assert await reports() == []
        await ask(master, forward((0, 0, 8)))
        (line,) = await reports()
        assert await reports() == []
    pattern = r"([\d.]+) operations/s, ([\d.]+) tokens/s, read ([\d.]+) \w+/s, write ([\d.]+) \w+/s"
    match = re.fullmatch(pattern, line)
    assert match, line
    assert all(float(rate) > 0 for rate in match.groups())
    assert float(match[2]) == pytest.approx(8 * float(match[1]), rel=0.1)
