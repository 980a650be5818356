"""Connections over real sockets of loopback: order, ends, and the count of bytes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from test_messages import WELCOME

from cake.errors import ProtocolError
from cake.net.connection import Connection, ConnectionLostError, connect
from cake.net.listener import bind, listen
from cake.protocol.frames import encode
from cake.protocol.messages import Forget, Forward, Goodbye, Hello, Message, Result, WireSegment, WireTensor

HELLO = Hello(1, "cake/0.1.0", "attic", "")
TENSOR = WireTensor("float32", (2, 1), bytearray(8))
FORWARD = Forward(0, 0, (WireSegment(0, 0, 2, 0),), (), (), TENSOR)


def wire(*messages: Message) -> bytes:
    return b"".join(bytes(part) for message in messages for part in encode(message))


async def soon(awaitable):
    return await asyncio.wait_for(awaitable, 30)


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[tuple[str, int], asyncio.Future[Connection]]]:
    """An address that a worker listens on, and the connection of the first who calls."""
    accepted: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
    server = await listen(bind("127.0.0.1", 0), accepted.set_result)
    try:
        yield server.sockets[0].getsockname(), accepted
    finally:
        server.close()
        if accepted.done():
            accepted.result().abort()


@asynccontextmanager
async def connections() -> AsyncIterator[tuple[Connection, Connection]]:
    """A master's and a worker's end."""
    async with listening() as (address, accepted):
        master = await connect(*address)
        try:
            yield master, await soon(accepted)
        finally:
            master.abort()


@asynccontextmanager
async def raw_and_worker() -> AsyncIterator[tuple[asyncio.StreamWriter, Connection]]:
    """A peer that may say anything, and the worker's connection that hears it."""
    async with listening() as (address, accepted):
        _, writer = await asyncio.open_connection(*address)
        try:
            yield writer, await soon(accepted)
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def greet(master: Connection, worker: Connection) -> None:
    await master.send(HELLO)
    await soon(worker.receive())
    await worker.send(WELCOME)
    await soon(master.receive())


async def test_both_directions_and_the_count_of_bytes() -> None:
    async with connections() as (master, worker):
        said: list[tuple[Connection, Connection, Message]] = [
            (master, worker, HELLO),
            (worker, master, WELCOME),
            (master, worker, FORWARD),
            (worker, master, Result(0, (), TENSOR)),
            (master, worker, Goodbye("done")),
        ]
        worker.raise_limits(8)
        master.raise_limits(8)
        sent = {master: 0, worker: 0}
        for speaker, hearer, message in said:
            n_sent = await speaker.send(message)
            heard = await soon(hearer.receive())
            assert heard.message == message
            assert n_sent == heard.n_bytes == len(wire(message))
            sent[speaker] += n_sent
        assert master.bytes_sent == worker.bytes_received == sent[master]
        assert worker.bytes_sent == master.bytes_received == sent[worker]


async def test_messages_that_arrive_together_are_received_one_by_one() -> None:
    async with raw_and_worker() as (peer, worker):
        peer.write(wire(HELLO, Goodbye("changed my mind")))
        assert (await soon(worker.receive())).message == HELLO
        assert (await soon(worker.receive())).message == Goodbye("changed my mind")
        assert worker.bytes_received == len(wire(HELLO, Goodbye("changed my mind")))


async def test_a_large_message_crosses_in_pieces() -> None:
    n = 4 * 2**20
    async with connections() as (master, worker):
        await greet(master, worker)
        worker.raise_limits(n)
        large = Forward(
            0,
            0,
            (WireSegment(0, 0, 1, 0),),
            (),
            (),
            WireTensor("float32", (1, n // 4), bytes(range(256)) * (n // 256)),
        )
        sending = asyncio.create_task(master.send(large))
        frame = await soon(worker.receive())
        assert frame.message == large
        assert await soon(sending) == frame.n_bytes == master.bytes_sent - len(wire(HELLO))


async def test_nothing_out_of_order_is_sent() -> None:
    async with connections() as (master, worker):
        with pytest.raises(ProtocolError, match="forward message from the master is out of order"):
            await master.send(FORWARD)
        with pytest.raises(ProtocolError, match="welcome message from the worker is out of order"):
            await worker.send(WELCOME)
        assert master.bytes_sent == worker.bytes_sent == 0
        await master.send(HELLO)
        assert (await soon(worker.receive())).message == HELLO


async def test_nothing_out_of_order_is_received() -> None:
    async with raw_and_worker() as (peer, worker):
        peer.write(wire(HELLO, HELLO))
        assert (await soon(worker.receive())).message == HELLO
        with pytest.raises(ProtocolError, match="hello message from the master is out of order"):
            await soon(worker.receive())


async def test_a_payload_before_limits_are_raised_is_refused() -> None:
    async with connections() as (master, worker):
        await greet(master, worker)
        await master.send(FORWARD)
        with pytest.raises(ProtocolError, match="a payload of 8 bytes is over the limit 0"):
            await soon(worker.receive())


@pytest.mark.parametrize("n_bytes", [1, 15, 16, 17, len(wire(HELLO)) - 1])
async def test_an_end_in_the_middle_of_a_frame(n_bytes: int) -> None:
    async with raw_and_worker() as (peer, worker):
        peer.write(wire(HELLO)[:n_bytes])
        peer.write_eof()
        with pytest.raises(ProtocolError, match="in the middle of a frame"):
            await soon(worker.receive())


@pytest.mark.parametrize("first", [[], [HELLO]], ids=["at once", "after a message"])
async def test_a_clean_end(first: list[Message]) -> None:
    async with raw_and_worker() as (peer, worker):
        peer.write(wire(*first))
        peer.write_eof()
        for message in first:
            assert (await soon(worker.receive())).message == message
        with pytest.raises(ConnectionLostError, match="the master closed the connection"):
            await soon(worker.receive())


async def test_an_abort_is_a_lost_connection() -> None:
    async with connections() as (master, worker):
        master.abort()
        with pytest.raises(ConnectionLostError):
            await soon(worker.receive())


async def test_sending_to_one_who_is_gone() -> None:
    async with connections() as (master, worker):
        await greet(master, worker)
        worker.abort()
        with pytest.raises(ConnectionLostError):
            await soon(master.receive())
        with pytest.raises(ConnectionLostError, match=r"the worker (is gone|closed the connection)"):
            for _ in range(100):  # the first may still get into the socket
                await soon(master.send(Forget((1,))))


async def test_goodbye_on_close_reaches_the_peer() -> None:
    async with connections() as (master, worker):
        await greet(master, worker)
        await soon(worker.close("the lights go out"))
        assert (await soon(master.receive())).message == Goodbye("the lights go out")
        with pytest.raises(ConnectionLostError):
            await soon(master.receive())


async def test_close_without_a_reason_says_nothing() -> None:
    async with connections() as (master, worker):
        await greet(master, worker)
        before = worker.bytes_sent
        await soon(worker.close())
        with pytest.raises(ConnectionLostError, match="closed the connection"):
            await soon(master.receive())
        assert worker.bytes_sent == before


async def test_closing_twice_and_after_the_peer_is_no_error() -> None:
    async with connections() as (master, worker):
        await greet(master, worker)
        await soon(worker.close("first"))
        await soon(master.receive())
        sent = master.bytes_sent
        await soon(master.close("second"))  # the conversation is over: nothing more may be said
        await soon(worker.close("third"))
        assert master.bytes_sent == sent


async def test_the_peers_address() -> None:
    async with raw_and_worker() as (peer, worker):
        host, port = peer.get_extra_info("sockname")
        assert worker.peer_address == f"{host}:{port}"
