"""What a worker's strangers can do, with a cluster key and without: nothing that its masters notice."""

import asyncio
import contextlib
import logging
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from conftest import greedy_ids, pipeline_over, serving, transformers_ids
from test_connection import soon, wire
from test_worker import HELLO, ask, forward, raw

from cake.errors import NodeError
from cake.net.admission import Network
from cake.net.tls import Credentials, new_credentials
from cake.protocol.cluster_key import Preface
from cake.protocol.messages import Failed, Forget, Goodbye, Result
from cake.topology import Node
from cake.visit import Service
from cake.worker import Worker

SPAN = range(0, 3)
PROMPT = [3, 1, 4, 1, 5]
KEY = "correct horse battery staple"
OURS, THEIRS = new_credentials(KEY), new_credentials("Tr0ub4dor&3 Tr0ub4dor&3")
CREDENTIALS = pytest.mark.parametrize("credentials", [None, OURS], ids=["plain", "keyed"])


async def calls(folder: Path, node: Node, credentials: Credentials | None) -> list[int]:
    """What a master gets that comes now."""
    async with pipeline_over(folder, node, credentials=credentials) as pipeline:
        return await soon(greedy_ids(pipeline, PROMPT, 4))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_key_changes_nothing_of_the_text(tiny_model: Path) -> None:
    async with (
        serving(tiny_model, "w0", range(0, 2), credentials=OURS) as a,
        serving(tiny_model, "w1", range(2, 5), credentials=new_credentials(KEY)) as b,
        pipeline_over(tiny_model, a, b, credentials=new_credentials(KEY)) as pipeline,
    ):
        assert await soon(greedy_ids(pipeline, PROMPT, 8)) == transformers_ids(tiny_model, PROMPT, 8)
        links = pipeline.crew.workers["w0"].links.values()
        assert list(links) == ["w1"], "the workers have proven the key to one another"


REFUSED = {
    "no key": (
        OURS,
        None,
        "refused: this worker wants a cluster key; give both the same",
        "wants a cluster key",
    ),
    "another key": (
        OURS,
        THEIRS,
        "refuses this cluster key; give both the same",
        "its cluster key is another",
    ),
    "a key too many": (
        None,
        OURS,
        "refused: one side has a cluster key and",
        "one side has a cluster key and",
    ),
}


@pytest.mark.parametrize(("workers", "masters", "heard", "logged"), REFUSED.values(), ids=REFUSED)
async def test_different_keys_are_one_line_on_either_side(
    tiny_model: Path,
    caplog: pytest.LogCaptureFixture,
    workers: Credentials | None,
    masters: Credentials | None,
    heard: str,
    logged: str,
) -> None:
    async with serving(tiny_model, "w0", SPAN, credentials=workers) as node:
        with pytest.raises(NodeError, match=rf"^worker 'w0' at {node.address} {heard}"):
            await calls(tiny_model, node, masters)
        (line,) = warnings(caplog)
        assert logged in line
        assert await calls(tiny_model, node, workers) == transformers_ids(tiny_model, PROMPT, 4)


async def test_another_name_is_called_so_once_the_key_is_proven(tiny_model: Path) -> None:
    async with serving(tiny_model, "w0", SPAN, credentials=OURS) as node:
        stranger = Node("w1", node.host, node.port, node.spans)
        with pytest.raises(NodeError, match="this worker is 'w0', not 'w1'; check the host"):
            await calls(tiny_model, stranger, OURS)


@CREDENTIALS
async def test_only_allowed_addresses(tiny_model: Path, credentials: Credentials | None, caplog) -> None:
    async with serving(tiny_model, "w0", SPAN, credentials=credentials, allow=["10.0.0.0/8"]) as node:
        with pytest.raises(
            NodeError, match=r"refused: this worker allows no masters at 127\.0\.0\.1 \(--allow\)"
        ):
            await calls(tiny_model, node, credentials)
    assert len(warnings(caplog)) == 1
    async with serving(tiny_model, "w0", SPAN, credentials=credentials, allow=["127.0.0.0/8"]) as node:
        assert len(await calls(tiny_model, node, credentials)) == 4


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long strangers were to wait; nobody does."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    for module in ("visit", "net.admission"):
        fake = type("asyncio", (), {**vars(asyncio), "sleep": staticmethod(sleep)})
        monkeypatch.setattr(f"cake.{module}.asyncio", fake)
    return slept


async def test_refusals_take_as_long_whatever_was_wrong(
    tiny_model: Path, sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is left of the same time is waited for."""
    monkeypatch.setattr("cake.net.admission.MAX_FAILURES", 100)
    openings = [
        wire(HELLO),
        random.Random(1).randbytes(1024),
        Preface(bytes(32), bytes(300)).encode(),
        Preface(bytes(32), OURS.certificate).encode() + b"early",
    ]
    async with serving(tiny_model, "w0", SPAN, credentials=OURS) as node:
        for opening in openings:
            async with raw(node) as stranger:
                stranger.writer.write(opening)
                await stranger.gone()
        with pytest.raises(NodeError, match="refuses this cluster key"):
            await calls(tiny_model, node, THEIRS)
    assert len(sleeps) == len(openings) + 1
    assert all(seconds <= 0.25 for seconds in sleeps)


async def test_three_wrong_keys_slow_an_address_down(tiny_model: Path, sleeps: list[float]) -> None:
    async with serving(tiny_model, "w0", SPAN, credentials=OURS) as node:
        for _ in range(3):
            with pytest.raises(NodeError):
                await calls(tiny_model, node, THEIRS)
        sleeps.clear()
        with pytest.raises(NodeError):
            await calls(tiny_model, node, THEIRS)
        before, refusal = sleeps
        assert before == 1
        assert 0.25 < refusal <= 1.25
        assert len(await calls(tiny_model, node, OURS)) == 4
        assert 2 <= sleeps[2] <= 3, "the right one too, after the turn of the one before"


async def test_those_without_a_key_slow_down_only_themselves(tiny_model: Path, sleeps: list[float]) -> None:
    async with serving(tiny_model, "w0", SPAN, credentials=OURS) as node:
        for _ in range(3):
            with pytest.raises(NodeError):
                await calls(tiny_model, node, None)
        sleeps.clear()
        with pytest.raises(NodeError):
            await calls(tiny_model, node, None)
        assert 0.25 < sleeps.pop() <= 1.25
        assert len(await calls(tiny_model, node, OURS)) == 4
        assert sleeps == []


async def test_the_key_is_in_no_log(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(tiny_model, "w0", SPAN, credentials=OURS) as node:
        await calls(tiny_model, node, OURS)
        with pytest.raises(NodeError):
            await calls(tiny_model, node, None)
    assert KEY not in caplog.text
    assert OURS.key.hex() not in caplog.text


def hello_and_gone(s: socket.socket) -> None:
    s.send(wire(HELLO))
    s.close()


def half_close(s: socket.socket) -> None:
    s.shutdown(socket.SHUT_WR)


STRANGERS: dict[str, Callable[[socket.socket], object]] = {
    "connect and close": socket.socket.close,
    "hello and gone": hello_and_gone,
    "HTTP": lambda s: s.send(b"GET / HTTP/1.1\r\nHost: porch\r\n\r\n"),
    "noise": lambda s: s.send(random.Random(1).randbytes(1024)),
    "a length of 2**63": lambda s: s.send(struct.pack(">4sIQ", b"CAKE", 16, 2**63)),
    "3 GB announced": lambda s: s.send(struct.pack(">4sIQ", b"CAKE", 64, 3 * 2**30) + bytes(64)),
    "idle": lambda s: None,
    "a byte of a hello": lambda s: s.send(b"C"),
    "half-closed": half_close,
    "the beginning of a preface": lambda s: s.send(b"CAKETLS1" + bytes(32)),
    "a preface": lambda s: s.send(Preface(bytes(32), THEIRS.certificate).encode()),
}


@asynccontextmanager
async def crowd(node: Node, behave: Callable[[socket.socket], object], n: int) -> AsyncIterator[None]:
    """So many sockets to the worker, all open until the end unless they close themselves."""
    with contextlib.ExitStack() as stack:
        for _ in range(n):
            s = stack.enter_context(socket.create_connection((node.host, node.port)))
            with contextlib.suppress(OSError):
                behave(s)
            await asyncio.sleep(0)  # the worker is in this process
        yield


@CREDENTIALS
@pytest.mark.parametrize("behave", STRANGERS.values(), ids=STRANGERS)
async def test_a_crowd_keeps_no_master_out(
    tiny_model: Path, credentials: Credentials | None, behave: Callable[[socket.socket], object], monkeypatch
) -> None:
    """Nor drives one out that was there; nobody's time ends meanwhile."""
    monkeypatch.setattr("cake.visit.HANDSHAKE_S", 1000.0)
    expected = transformers_ids(tiny_model, PROMPT, 4)
    async with serving(tiny_model, "porch", SPAN, credentials=credentials) as node, AsyncExitStack() as stack:
        before = await stack.enter_async_context(pipeline_over(tiny_model, node, credentials=credentials))
        async with crowd(node, behave, 200):
            assert await calls(tiny_model, node, credentials) == expected
            assert await soon(greedy_ids(before, PROMPT, 4)) == expected


async def test_crowds_leave_nothing_behind(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(service: Service, allowed: Sequence[Network]) -> Worker:
        workers.append(Worker(service, allowed))
        return workers[-1]

    workers: list[Worker] = []

    monkeypatch.setattr("conftest.Worker", recorded)
    async with serving(tiny_model, "porch", SPAN, credentials=OURS) as node:
        for behave in STRANGERS.values():
            async with crowd(node, behave, 100):
                pass
        (worker,) = workers
        while worker._visits:
            await soon(asyncio.wait(worker._visits))
            await asyncio.sleep(0)
        assert not worker._admission._silent
        assert not worker._admission._begun
        assert not worker._of_masters


async def test_sessions_have_an_end(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cake.work.MAX_SESSIONS", 3)
    async with (
        serving(tiny_model, "porch", SPAN) as node,
        raw(node, HELLO) as master,
        raw(node, HELLO) as other,
    ):
        for session in (1, 2, 3, 1):
            assert isinstance(await ask(master, forward((session, 0, 1))), Result)
        assert await ask(master, forward((4, 0, 1))) == Failed(5, "more than 3 sessions; forget some first")
        assert isinstance(await ask(other, forward((4, 0, 1))), Result)
        master.say(Forget((2,)))
        assert isinstance(await ask(master, forward((4, 0, 1))), Result)


async def test_a_worker_that_stops_tells_its_masters_and_no_strangers(tiny_model: Path) -> None:
    async with AsyncExitStack() as stack:
        async with serving(tiny_model, "porch", SPAN) as node:
            master = await stack.enter_async_context(raw(node, HELLO))
            stranger = await stack.enter_async_context(raw(node))
        assert await master.hear_all() == [Goodbye("the test is over")]
        assert await stranger.hear_all() == []
