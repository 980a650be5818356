"""The master's side of a worker, against fakes that misbehave in every way."""

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import torch
from msgspec import structs
from test_connection import soon

from cake.chain import Chain
from cake.dialling import Patience, connect_worker
from cake.errors import NodeError, SessionLostError
from cake.model.batch import Batch, Segment
from cake.net.connection import Connection, connect
from cake.protocol.frames import FrameReader, Limits, encode
from cake.protocol.handshake import SOFTWARE, Expectation
from cake.protocol.messages import (
    VERSION,
    Alive,
    Failed,
    Forget,
    Forward,
    Goodbye,
    Hello,
    Lost,
    Message,
    Result,
    SpanInfo,
    StageReport,
    Welcome,
    WireSegment,
    WireTensor,
)
from cake.remote import RemoteStage, RemoteWorker
from cake.topology import Node

SPAN = range(0, 3)
EXPECTED = Expectation("porch", "m", 4, (SPAN,), ("aa",))
SPANS = (SpanInfo(0, 2, "aa"),)
WELCOME = Welcome(
    VERSION, "cake/9.9", "porch", "m", SPANS, "cuda:0", "float16", "int4", 512, 2048, "5ec7e7", 0.0
)
BRIEF = Patience(total=0.3, first_pause=0.01, handshake=2.0)


class Peer:
    """One end of a connection, with no manners of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._frames, self._inbox = FrameReader(Limits(2**16, 2**24)), []

    async def hear(self) -> Message:
        while not self._inbox:
            data = await soon(self.reader.read(2**16))
            assert data, "the other end hung up"
            self._inbox += self._read(data)
        return self._inbox.pop(0)

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.writer.writelines(encode(message))

    async def hear_all(self) -> list[Message]:
        """Everything until the other end hangs up."""
        rest = await soon(self.reader.read())
        return self._inbox + self._read(rest)

    def _read(self, data: bytes) -> list[Message]:
        """What it says besides being alive."""
        messages = [frame.message for frame in self._frames.feed(data)]
        return [message for message in messages if not isinstance(message, Alive)]

    async def gone(self) -> None:
        """Wait until the other end has hung up."""
        with contextlib.suppress(OSError):
            await self.reader.read()


@asynccontextmanager
async def fake(behave: Callable[[Peer], Awaitable[object]]) -> AsyncIterator[Node]:
    """A listener that treats every master so; what fails in it fails the test."""
    visits: list[asyncio.Task[None]] = []

    async def visit(peer: Peer) -> None:
        try:
            await behave(peer)
        finally:
            peer.writer.close()

    def accept(*streams) -> None:
        visits.append(asyncio.create_task(visit(Peer(*streams))))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield Node("porch", "127.0.0.1", server.sockets[0].getsockname()[1], (SPAN,))
        await soon(asyncio.gather(*visits))
    finally:
        server.close()
        for task in visits:
            task.cancel()
        await asyncio.gather(*visits, return_exceptions=True)


@asynccontextmanager
async def greeted(
    behave: Callable[[Peer], Awaitable[object]],
) -> AsyncIterator[tuple[RemoteWorker, Chain]]:
    """A fake that shakes hands well and behaves so afterwards, and the master's stage of it."""

    async def shake_hands(peer: Peer) -> None:
        await peer.hear()
        peer.say(WELCOME)
        await behave(peer)

    async with fake(shake_hands) as node:
        worker = await soon(connect_worker(node, EXPECTED, Patience()))
        try:
            yield worker, Chain([RemoteStage(worker, SPAN)])
        finally:
            await soon(worker.close())


def batch(session: int = 0, *values: float) -> Batch:
    hidden = torch.tensor([[value] * 4 for value in values or (1.0,)])
    return Batch(hidden, (Segment(session, 0, len(hidden)),))


def result(forward: Message, factor: float = 10.0) -> Result:
    """The same states, times a factor."""
    assert isinstance(forward, Forward)
    hidden = torch.frombuffer(bytearray(forward.hidden.data), dtype=torch.float32) * factor
    reports = (StageReport(0.125, 0.25, 0.0, sum(map(len, encode(forward)))),)
    return Result(forward.id, reports, WireTensor("float32", forward.hidden.shape, hidden.numpy().tobytes()))


@contextlib.contextmanager
def reserved_port():
    """A bound socket that does not listen: whoever calls is refused."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener, Node("porch", *listener.getsockname(), (SPAN,))


async def test_a_refused_port_until_patience_ends(caplog: pytest.LogCaptureFixture) -> None:
    with reserved_port() as (_, node), pytest.raises(NodeError) as caught:
        await soon(connect_worker(node, EXPECTED, BRIEF))
    line = str(caught.value)
    assert line.startswith(f"worker 'porch' at {node.address} cannot be reached (")
    assert "--mode worker --name porch" in line
    assert [record.getMessage()[:26] for record in caplog.records] == ["waiting for worker 'porch'"]


async def test_a_refused_port_is_called_so() -> None:
    """Not asyncio's "Connect call failed ('127.0.0.1', 51385)", which tells nobody why."""
    with reserved_port() as (_, node), pytest.raises(NodeError, match=r"(?i)refused"):
        await soon(connect_worker(node, EXPECTED, Patience(total=0.01)))


async def test_a_listener_that_appears_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    opened: list[asyncio.Server] = []

    async def answer(*streams) -> None:
        peer = Peer(*streams)
        assert await peer.hear() == Hello(VERSION, SOFTWARE, "porch", "")
        peer.say(WELCOME)
        assert isinstance(await peer.hear(), Goodbye)
        peer.writer.close()

    async def open_later(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            opened.append(await asyncio.start_server(answer, sock=listener))

    with reserved_port() as (listener, node):
        monkeypatch.setattr("cake.dialling.asyncio.sleep", open_later)
        patience = Patience(total=60, first_pause=1, longest_pause=3)
        worker = await soon(connect_worker(node, EXPECTED, patience))
        assert worker.welcome == WELCOME
        assert pauses == [1, 2, 3, 3]
        await soon(worker.close())
        opened[0].close()


@pytest.mark.parametrize("host", ["192.168..1.20", "x" * 64], ids=["two dots", "long label"])
async def test_a_host_that_is_no_name(host: str) -> None:
    with pytest.raises(NodeError, match="cannot be reached"):
        await soon(connect_worker(Node("porch", host, 1, (SPAN,)), EXPECTED, Patience(total=0.1)))


async def silent(peer: Peer) -> None:
    await peer.gone()


async def http(peer: Peer) -> None:
    peer.writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await peer.gone()


async def hangs_up(peer: Peer) -> None:
    await peer.hear()


async def hangs_up_in_mid_frame(peer: Peer) -> None:
    await peer.hear()
    peer.writer.write(b"".join(encode(WELCOME))[:-1])


def says(message: Message) -> Callable[[Peer], Awaitable[None]]:
    async def say(peer: Peer) -> None:
        await peer.hear()
        peer.say(message)
        await peer.gone()

    return say


def welcome(**changes: object) -> Welcome:
    return structs.replace(WELCOME, **changes)


UNFIT = {
    "silent": (silent, "accepts connections but does not answer"),
    "http": (http, "does not speak Cake's protocol: .*wrong magic"),
    "hangs up": (hangs_up, "hung up during the handshake"),
    "mid-frame": (hangs_up_in_mid_frame, "does not speak Cake's protocol: .*middle of a frame"),
    "goodbye": (says(Goodbye("I am 'attic'")), "refused: I am 'attic'"),
    "other message": (says(Forget((1,))), "does not speak Cake's protocol: .*out of order"),
    "other version": (says(welcome(version=9)), f"speaks protocol version 9, this master {VERSION}"),
    "other model": (says(welcome(model="n")), "serves another model"),
    "other spans": (
        says(welcome(spans=(SpanInfo(3, 5, "aa"),))),
        "serves blocks 3-5, but this topology says 0-2",
    ),
    "other weights": (
        says(welcome(spans=(SpanInfo(0, 2, "zz"),))),
        "serves another model: the weights of its blocks 0-2 differ",
    ),
}


@pytest.mark.parametrize(("behave", "substance"), UNFIT.values(), ids=UNFIT)
async def test_a_listener_that_will_not_do(behave: Callable[[Peer], Awaitable[None]], substance: str) -> None:
    patience = Patience(handshake=0.2 if "does not answer" in substance else 20)
    async with fake(behave) as node:
        with pytest.raises(NodeError, match=f"^worker 'porch' at {node.address} {substance}"):
            await soon(connect_worker(node, EXPECTED, patience))


async def test_a_refusal_that_comes_before_the_greeting(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = asyncio.Event()

    class Hearing(Connection):
        def buffer_updated(self, n_bytes: int) -> None:
            super().buffer_updated(n_bytes)
            heard.set()

    async def connect_and_hear(host: str, port: int, new: object) -> Connection:
        connection = await connect(host, port, Hearing)
        await heard.wait()
        return connection

    async def refuse(peer: Peer) -> None:
        peer.say(Goodbye("not from there"))
        await peer.gone()

    monkeypatch.setattr("cake.dialling.connect", connect_and_hear)
    async with fake(refuse) as node:
        with pytest.raises(NodeError, match=f"^worker 'porch' at {node.address} refused: not from there$"):
            await soon(connect_worker(node, EXPECTED, Patience()))


async def test_a_result() -> None:
    heard: list[Message] = []

    async def serve(peer: Peer) -> None:
        heard.append(await peer.hear())
        peer.say(result(heard[0]))
        heard.extend([await peer.hear(), await peer.hear()])

    async with greeted(serve) as (_, stage):
        (remote,) = stage.stages
        assert (remote.node, remote.blocks, remote.device, remote.dtype) == (
            "porch",
            SPAN,
            "cuda:0",
            "float16",
        )
        computed = await soon(stage.forward(batch(7, 1.0, -2.0)))
        assert computed.hidden.tolist() == [[10.0] * 4, [-20.0] * 4]
        assert computed.compute_s == 0.25
        stats = remote.stats
        assert (stats.messages, stats.tokens, stats.compute_s) == (1, 2, 0.25)
        assert stats.bytes_sent == sum(map(len, encode(heard[0])))
        assert stats.bytes_received == sum(map(len, encode(result(heard[0]))))
        await remote.forget([7, 8])
    assert heard[0].segments == (WireSegment(session=7, position=0, length=2, source=7),)
    assert heard[1:] == [Forget((7, 8)), Goodbye("the master is done")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
async def test_hidden_states_travel_in_the_dtype_that_was_chosen(dtype: str) -> None:
    async def serve(peer: Peer) -> None:
        forward = await peer.hear()
        assert isinstance(forward, Forward)
        heard.append(forward.hidden.dtype)
        peer.say(Result(forward.id, (StageReport(0.0, 0.25, 0.0, 9),), forward.hidden))
        await peer.gone()

    heard: list[str] = []
    async with greeted(serve) as (worker, _):
        computed = await soon(Chain([RemoteStage(worker, SPAN)], (), dtype).forward(batch(7, 1.0, -2.0)))
    assert heard == [dtype]
    assert computed.hidden.dtype == torch.float32
    assert torch.allclose(computed.hidden, torch.tensor([[1.0] * 4, [-2.0] * 4]), rtol=1 / 256)


async def test_long_forwards_over_a_slow_link_go_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake says that it computed for no time at all, so what the answer took is the link's."""

    async def serve(peer: Peer) -> None:
        for _ in range(3):
            forward = await peer.hear()
            assert isinstance(forward, Forward)
            heard.append(forward.hidden.dtype)
            peer.say(Result(forward.id, (StageReport(0.0, 0.0, 0.0, 9),), forward.hidden))
        await peer.gone()

    monkeypatch.setattr("cake.wire_dtype.NOTICED_S", 0.0)
    monkeypatch.setattr("cake.wire_dtype.MEASURED_BYTES", 1)
    heard: list[str] = []
    async with greeted(serve) as (_, stage):
        for n_tokens in (17, 17, 16):
            await soon(stage.forward(batch(7, *[1.0] * n_tokens)))
    assert heard == ["float32", "int8", "float32"]


async def test_answers_are_matched_by_id() -> None:
    async def serve(peer: Peer) -> None:
        first, second, third = [await peer.hear() for _ in range(3)]
        stranger = Result(10**9, (), WireTensor("float32", (1, 4), bytes(16)))
        peer.say(result(third), stranger, Failed(10**9 + 1, "whose?"), Lost(second.id, 5, 2), result(first))
        await peer.gone()

    async with greeted(serve) as (_, stage):
        calls = [stage.forward(batch(n, float(n))) for n in (4, 5, 6)]
        first, second, third = await soon(asyncio.gather(*calls, return_exceptions=True))
    assert first.hidden.tolist() == [[40.0] * 4]
    assert isinstance(second, SessionLostError)
    assert third.hidden.tolist() == [[60.0] * 4]


async def test_lost_and_failed_leave_the_worker_usable() -> None:
    async def serve(peer: Peer) -> None:
        peer.say(Lost((await peer.hear()).id, 7, 3))
        peer.say(Failed((await peer.hear()).id, "out of memory"))
        peer.say(result(await peer.hear()))
        await peer.gone()

    async with greeted(serve) as (_, stage):
        with pytest.raises(SessionLostError) as caught:
            await soon(stage.forward(batch(7)))
        assert (caught.value.session, caught.value.held) == (7, 3)
        with pytest.raises(NodeError, match=r"^worker 'porch' at .* failed: out of memory"):
            await soon(stage.forward(batch(7)))
        assert (await soon(stage.forward(batch(7)))).hidden.tolist() == [[10.0] * 4]
        assert stage.stages[0].stats.messages == 3


async def test_an_answer_of_another_shape() -> None:
    async def serve(peer: Peer) -> None:
        forward = await peer.hear()
        peer.say(Result(forward.id, (), WireTensor("float32", (4, 1), bytes(16))))
        await peer.gone()

    async with greeted(serve) as (_, stage):
        with pytest.raises(NodeError, match=r"worker 'porch' answered hidden states of \(4, 1\) to \(1, 4\)"):
            await soon(stage.forward(batch()))


ENDS = {
    "close": (lambda peer: None, "closed the connection"),
    "abort": (lambda peer: peer.writer.transport.abort(), "lost worker 'porch'"),
    "goodbye": (lambda peer: peer.say(Goodbye("Ctrl-C")), "it said goodbye: Ctrl-C"),
    "noise": (lambda peer: peer.writer.write(b"segmentation fault"), "wrong magic"),
    "half a frame": (lambda peer: peer.writer.write(b"CAKE"), "middle of a frame"),
}


@pytest.mark.parametrize(("end", "substance"), ENDS.values(), ids=ENDS)
async def test_a_worker_that_ends_in_mid_forward(end: Callable[[Peer], object], substance: str) -> None:
    async def serve(peer: Peer) -> None:
        await peer.hear()
        await peer.hear()
        end(peer)

    async with greeted(serve) as (_, stage):
        calls = [stage.forward(batch(n)) for n in range(2)]
        failures = await soon(asyncio.gather(*calls, return_exceptions=True))
        with pytest.raises(NodeError, match=substance):
            await soon(stage.forward(batch(9)))  # whoever comes later hears the same
        await stage.stages[0].forget([1])  # and nobody minds
    for failure in failures:
        assert isinstance(failure, NodeError)
        assert str(failure).startswith("lost worker 'porch' at ")
        assert substance in str(failure)


async def test_a_worker_that_dies_while_it_is_being_sent_to(caplog: pytest.LogCaptureFixture) -> None:
    async def serve(peer: Peer) -> None:
        await peer.reader.readexactly(16)
        peer.writer.transport.abort()

    large = Batch(torch.zeros(2**18, 4, dtype=torch.float32), (Segment(0, 0, 2**18),))
    async with greeted(serve) as (worker, stage):
        with pytest.raises(NodeError, match="lost worker 'porch'"):
            await soon(stage.forward(large))
    del worker, stage
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_who_waits_for_an_answer_hears_of_the_close() -> None:
    async def serve(peer: Peer) -> None:
        await peer.hear()
        heard.set()
        await peer.gone()

    heard = asyncio.Event()
    async with greeted(serve) as (worker, stage):
        waiting = asyncio.create_task(stage.forward(batch()))
        await soon(heard.wait())
        await soon(worker.close())
        with pytest.raises(NodeError):
            await soon(waiting)


async def test_an_abandoned_forward_does_not_disturb_the_next() -> None:
    async def serve(peer: Peer) -> None:
        first = await peer.hear()
        heard.set()
        peer.say(result(first), result(await peer.hear(), 3.0))
        await peer.gone()

    heard = asyncio.Event()
    async with greeted(serve) as (_, stage):
        abandoned = asyncio.create_task(stage.forward(batch(0, 5.0)))
        await soon(heard.wait())
        abandoned.cancel()
        assert (await soon(stage.forward(batch(0, 6.0)))).hidden.tolist() == [[18.0] * 4]
        assert abandoned.cancelled()


async def test_sessions_have_numbers_on_the_wire() -> None:
    async with greeted(Peer.gone) as (_, stage):
        with pytest.raises(TypeError, match="'chat'"):
            await stage.forward(Batch(torch.zeros(1, 4), (Segment("chat", 0, 1),)))
