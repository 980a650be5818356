"""Clients that are slow, that leave, and that mean no good, on real sockets."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from http_served import Gate, Served, request, serving_http, shape_of, until

from cake.api import answering, connection, server
from cake.errors import NodeError

MANY = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 500, "logprobs": 5, "n": 4, "stream": True}
FEW = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 40}
TRICKLE_S = 0.02


@pytest.fixture
async def served(tiny_model: Path) -> AsyncIterator[Served]:
    async with serving_http(tiny_model) as served:
        yield served


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[..., Awaitable[Streams]]


@pytest.fixture
async def connect(served: Served) -> AsyncIterator[Connect]:
    """Opens connections, whose system may keep few bytes for them that nobody has read."""
    writers: list[asyncio.StreamWriter] = []
    address = urlsplit(served.url)

    async def connect(received_ahead: int | None = None) -> Streams:
        plain = socket.socket()
        if received_ahead:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, received_ahead)
        plain.setblocking(False)
        await asyncio.get_running_loop().sock_connect(plain, (address.hostname, address.port))
        reader, writer = await asyncio.open_connection(sock=plain, limit=received_ahead or 1 << 16)
        writers.append(writer)
        return reader, writer

    yield connect
    for writer in writers:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server ends the connection."""
    read = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            read += piece
    return bytes(read)


async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send byte after byte until the server ends the connection."""
    with contextlib.suppress(ConnectionError):
        while not reader.at_eof():
            writer.write(b"a")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(1), TRICKLE_S)


async def test_who_never_reads_holds_no_session_for_ever(
    served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "TAKE_S", 0.2)
    _, writer = await connect(4096)
    writer.write(request("/v1/completions", MANY))
    figures = served.generator.figures
    await until(lambda: figures.answers == 4)
    await until(lambda: figures.answering == 0)
    assert 0 < figures.tokens < 4 * 500


async def test_no_answer_runs_ahead_of_who_reads_it_slowly(
    served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused, pause = asyncio.Event(), connection.ClientConnection.pause_writing

    def pause_writing(self: connection.ClientConnection) -> None:
        pause(self)
        paused.set()

    monkeypatch.setattr(connection.ClientConnection, "pause_writing", pause_writing)
    reader, writer = await connect(4096)
    writer.write(request("/v1/completions", MANY))
    await paused.wait()
    figures, events = served.generator.figures, served.view.events()
    await anext(events), await anext(events)  # which gives it time to go on, if it does
    made = figures.tokens
    assert made < 4 * 500
    await anext(events)
    assert figures.tokens == made
    await events.aclose()
    read = bytearray()
    while b"[DONE]" not in read[-100:]:
        read += await reader.read(1 << 12)
    assert figures.tokens == 4 * 500


@pytest.mark.parametrize(
    ("before", "now", "judged"),
    [(900_000, 880_000, "waited for"), (900_000, 890_000, "given up"), (100, 100, "given up")],
)
def test_who_takes_long_is_waited_for_as_long_as_it_takes_some(before: int, now: int, judged: str) -> None:
    verdicts: list[str] = []
    transport = SimpleNamespace(get_write_buffer_size=lambda: now, abort=lambda: verdicts.append("given up"))
    fake = SimpleNamespace(transport=transport, _await_taking=lambda: verdicts.append("waited for"))
    connection.ClientConnection._judge_taking(fake, before)  # type: ignore[arg-type]
    assert verdicts == [judged]


@pytest.mark.parametrize(
    "begun", [b"POST /v1/comple", request("/v1/completions", FEW, length=10_000)], ids=["head", "body"]
)
async def test_who_asks_byte_by_byte_is_not_waited_for(
    served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(connection, "ASK_S", 10 * TRICKLE_S)
    reader, writer = await connect()
    writer.write(begun)
    await trickle(reader, writer)
    assert served.generator.figures.answers == 0


async def test_a_body_that_nobody_wanted_is_not_waited_for_either(
    served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ASK_S", 10 * TRICKLE_S)
    reader, writer = await connect()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10000\r\n\r\n")
    assert b" 401 " in await reader.readline()
    await trickle(reader, writer)


async def test_an_idle_connection_is_closed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.1)
    async with serving_http(tiny_model) as served:
        address = urlsplit(served.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(request("/v1/completions", {**FEW, "max_tokens": 1}))
        assert (await rest(reader)).startswith(b"HTTP/1.1 200 ")
        writer.close()
        await writer.wait_closed()


async def test_who_has_kept_the_server_waiting_longest_gives_way(
    served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 2)
    first, second = await connect(), await connect()
    for _, writer in (first, second):
        writer.write(b"GET /v1/mod")
    third = await connect()
    third[1].write(request("/v1/completions", {**FEW, "max_tokens": 1}))
    assert b" 200 " in await third[0].readline()
    assert await rest(first[0]) == b""
    second[1].write(b"els HTTP/1.1\r\n\r\n")
    assert (await second[0].readline()).startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize(
    ("path", "shape"),
    [("/v1/completions", "openai"), ("/api/generate", "ollama"), ("/v1/messages", "anthropic")],
)
async def test_where_all_are_being_answered_the_next_is_told_to_come_back_in_its_dialect(
    served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch, path: str, shape: str
) -> None:
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 1)
    gate = Gate(served.generator, 1)
    busy, busy_writer = await connect()
    busy_writer.write(request("/v1/completions", {**FEW, "stream": True}))
    assert b" 200 " in await busy.readline()
    reader, writer = await connect()
    writer.write(request(path, FEW))
    head, _, body = (await rest(reader)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5" in head
    assert shape_of(json.loads(body)) == shape
    gate.allow(100)
    assert b"[DONE]" in await busy.readuntil(b"[DONE]")


async def test_only_so_many_watch(served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cake.api.cluster.MOST_STREAMS", 1)
    async with served.client.stream("GET", "/api/v1/events") as watching:
        await anext(watching.aiter_lines())
        answer = await served.client.get("/api/v1/events")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")


@pytest.mark.parametrize("changes", [{"stream": True}, {}, {"n": 3}, {"n": 3, "stream": True}], ids=str)
async def test_not_one_token_is_made_for_who_has_left(
    served: Served, connect: Connect, changes: dict[str, Any]
) -> None:
    gate, figures = Gate(served.generator, 4), served.generator.figures
    reader, writer = await connect()
    writer.write(request("/v1/completions", {**FEW, **changes}))
    await until(lambda: figures.tokens >= 3)
    assert figures.answering == changes.get("n", 1)
    if "stream" in changes:
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    made = figures.tokens
    writer.close()
    await until(lambda: figures.answering == 0)
    gate.allow(1000)
    assert (await served.client.post("/v1/completions", json={**FEW, "max_tokens": 5})).status_code == 200
    assert figures.tokens - 5 <= made + changes.get("n", 1)


async def test_a_stream_that_fails_says_so_and_does_not_look_whole(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*arguments: object) -> None:
        raise NodeError("worker 'w0' failed: it is out of memory")

    gate = Gate(served.generator, 1)
    async with served.client.stream("POST", "/v1/completions", json={**FEW, "stream": True}) as stream:
        assert stream.status_code == 200
        monkeypatch.setattr(served.generator.pipeline, "choose", fail)
        gate.allow(1)
        *_, last = [line async for line in stream.aiter_lines() if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "worker_lost"
    for changes in ({}, {"stream": True}):
        answer = await served.client.post("/v1/completions", json={**FEW, **changes})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")


async def test_a_stream_whose_first_token_takes_long_begins_without_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "QUIET_S", 0)
    gate = Gate(served.generator, 0)
    async with served.client.stream("POST", "/v1/completions", json={**FEW, "stream": True}) as stream:
        assert stream.status_code == 200
        assert served.generator.figures.tokens == 0
        gate.allow(100)
        assert [line async for line in stream.aiter_lines() if line][-1] == "data: [DONE]"
