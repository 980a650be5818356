"""Keyed connections over real sockets: who gets through, and what those hear and learn who do not."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
from meddler import Address, Side, between, record, repeat, swap_certificates
from test_connection import soon, wire
from test_messages import WELCOME
from test_remote import Peer, fake

from cake.errors import CakeError, ClusterKeyError, ProtocolError
from cake.net.connection import Connection, ConnectionLostError, connect
from cake.net.keyed import WANTS_A_KEY, KeyedConnection, new_connection
from cake.net.listener import bind, listen
from cake.net.tls import Credentials, new_credentials
from cake.protocol.cluster_key import HEAD, Preface, read_head
from cake.protocol.messages import VERSION, Forward, Goodbye, Hello, Message, WireSegment, WireTensor

KEY = "correct horse battery staple"
MASTER, WORKER, STRANGER = (
    new_credentials(KEY),
    new_credentials(KEY),
    new_credentials("Tr0ub4dor&3 Tr0ub4dor&3"),
)
HELLO = Hello(VERSION, "test", "porch", "")


async def at_once() -> None:
    """Nobody waits for their turn."""


class Door:
    """What became of everybody who came, in their order: the connection, or why it was refused."""

    def __init__(self) -> None:
        self.outcomes: asyncio.Queue[Connection | CakeError | OSError] = asyncio.Queue()
        self.tasks: list[asyncio.Task[None]] = []
        self.address: Address = ("", 0)

    def open(self, connection: Connection) -> None:
        self.tasks.append(asyncio.create_task(self._judge(connection)))

    async def _judge(self, connection: Connection) -> None:
        assert isinstance(connection, KeyedConnection)
        try:
            await connection.prove_as_worker(await connection.hear_preface(), at_once)
        except (CakeError, OSError) as error:
            self.outcomes.put_nowait(error)
            await connection.close(str(error) if isinstance(error, CakeError) else None)
        else:
            self.outcomes.put_nowait(connection)

    async def next(self) -> Connection | CakeError | OSError:
        return await soon(self.outcomes.get())


@asynccontextmanager
async def door() -> AsyncIterator[Door]:
    """A worker's, with a cluster key."""
    door = Door()
    server = await listen(bind("127.0.0.1", 0), door.open, WORKER)
    door.address = server.sockets[0].getsockname()
    try:
        yield door
    finally:
        server.close()
        await soon(asyncio.gather(*door.tasks))


@asynccontextmanager
async def keyed(address: Address, credentials: Credentials = MASTER) -> AsyncIterator[KeyedConnection]:
    """A master's connection, before it has proven anything."""
    connection = await connect(*address, partial(new_connection, credentials=credentials))
    assert isinstance(connection, KeyedConnection)
    try:
        yield connection
    finally:
        connection.abort()


@asynccontextmanager
async def raw(address: Address) -> AsyncIterator[Peer]:
    peer = Peer(*await asyncio.open_connection(*address))
    try:
        yield peer
    finally:
        peer.writer.close()
        await asyncio.gather(peer.writer.wait_closed(), return_exceptions=True)


async def test_two_with_the_same_key() -> None:
    n = 2**20
    tensor = WireTensor("float32", (1, n // 4), random.Random(0).randbytes(n))
    large = Forward(0, 0, (WireSegment(0, 0, 1, 0),), (), (), tensor)
    async with door() as worker, keyed(worker.address) as master:
        await soon(master.prove_as_master("porch"))
        accepted = await worker.next()
        assert isinstance(accepted, KeyedConnection)
        for speaker, hearer, message in ((master, accepted, HELLO), (accepted, master, WELCOME)):
            await speaker.send(message)
            assert (await soon(hearer.receive())).message == message
            hearer.raise_limits(n)
        said = asyncio.create_task(master.send(large))
        frame = await soon(accepted.receive())
        assert frame.message == large
        assert await soon(said) == frame.n_bytes == len(wire(large))
        assert master.bytes_sent == accepted.bytes_received > frame.n_bytes
        assert master.bytes_received == accepted.bytes_sent
        await soon(accepted.close("the lights go out"))
        assert (await soon(master.receive())).message == Goodbye("the lights go out")
        with pytest.raises(ConnectionLostError):
            await soon(master.receive())


async def test_another_key() -> None:
    async with door() as worker, keyed(worker.address, STRANGER) as master:
        with pytest.raises(ClusterKeyError, match=r"^refuses this cluster key; give both the same"):
            await soon(master.prove_as_master("porch"))
        refusal = await worker.next()
        assert isinstance(refusal, ClusterKeyError)
        assert str(refusal) == "its cluster key is another, or another sits between"


OPENINGS = {
    "no key": wire(HELLO),
    "HTTP": b"GET / HTTP/1.1\r\nHost: porch\r\n\r\n",
    "noise": random.Random(1).randbytes(1024),
    "a length of 2**63": b"CAKE\0\0\0\x10" + (2**63).to_bytes(8, "big"),
}


@pytest.mark.parametrize("opening", OPENINGS.values(), ids=OPENINGS)
async def test_whoever_does_not_begin_with_a_preface_hears_the_same(opening: bytes) -> None:
    async with door() as worker, raw(worker.address) as stranger:
        stranger.writer.write(opening)
        assert await stranger.hear_all() == [Goodbye(WANTS_A_KEY)]
        assert isinstance(await worker.next(), ProtocolError)


SILENTLY = {
    "noise after the preface": (
        Preface(bytes(32), MASTER.certificate).encode() + bytes(100),
        "before its time",
    ),
    "no certificate": (Preface(bytes(32), b"").encode(), "a certificate of 0 bytes"),
    "one too long": (HEAD.pack(b"CAKETLS1", bytes(32), 1025), "a certificate of 1025 bytes"),
    "one that is none": (Preface(bytes(32), bytes(300)).encode(), "the peer's certificate is none"),
}


@pytest.mark.parametrize(("data", "reason"), SILENTLY.values(), ids=SILENTLY)
async def test_nonsense_in_a_preface(data: bytes, reason: str) -> None:
    async with door() as worker, raw(worker.address) as stranger:
        stranger.writer.write(data)
        await stranger.gone()
        refusal = await worker.next()
        assert isinstance(refusal, ProtocolError)
        assert reason in str(refusal)


async def test_much_before_the_proof() -> None:
    async with door() as worker, raw(worker.address) as stranger:
        stranger.writer.write(Preface(bytes(32), MASTER.certificate).encode())
        await soon(stranger.reader.readexactly(HEAD.size))
        for _ in range(5):  # the beginnings of a record that never ends
            stranger.writer.write(b"\x16\x03\x01\x40\x00" + bytes(1000))
        await stranger.gone()
        refusal = await worker.next()
        assert isinstance(refusal, ProtocolError)
        assert str(refusal) == "more than 4096 bytes before the cluster key was proven"


async def test_a_half_closed_socket() -> None:
    async with door() as worker, raw(worker.address) as stranger:
        stranger.writer.write(b"CAKETLS1")
        stranger.writer.write_eof()
        assert await soon(stranger.reader.read()) == b""
        assert isinstance(await worker.next(), ConnectionLostError)


def plain(*answers: Message) -> Callable[[Peer], Awaitable[None]]:
    """A worker that does not understand, and says this."""

    async def answer(peer: Peer) -> None:
        await soon(peer.reader.readexactly(16))
        peer.say(*answers)
        await peer.gone()

    return answer


async def test_a_master_with_a_key_hears_why_a_worker_without_refuses() -> None:
    async with fake(plain(Goodbye("I have none\x1b[2J\n"))) as node, keyed((node.host, node.port)) as master:
        with pytest.raises(ClusterKeyError, match=r"^refused: I have none\?\[2J\?$"):
            await soon(master.prove_as_master("porch"))


async def test_a_master_with_a_key_says_nothing_to_a_worker_that_plays_on_without() -> None:
    async with fake(plain(WELCOME)) as node, keyed((node.host, node.port)) as master:
        with pytest.raises(ProtocolError, match="welcome message from the worker is out of order"):
            await soon(master.prove_as_master("porch"))


async def test_nothing_is_said_before_the_proof() -> None:
    """However the one who uses the connection closes it."""
    async with door() as worker, raw(worker.address) as stranger:
        stranger.writer.write(Preface(bytes(32), MASTER.certificate).encode())
        _, length = read_head(await soon(stranger.reader.readexactly(HEAD.size)))
        await soon(stranger.reader.readexactly(length))
        stranger.writer.write(b"no TLS")
        assert await soon(stranger.reader.read()) == b""
        assert isinstance(await worker.next(), ProtocolError)


async def test_a_relay_that_swaps_the_certificates_is_found_out() -> None:
    """By the worker; the master, whose proof it was, hears nothing that the relay could not have said."""
    async with (
        door() as worker,
        between(worker.address, swap_certificates(STRANGER)) as address,
        keyed(address) as master,
    ):
        with pytest.raises(ClusterKeyError, match="refuses this cluster key"):
            await soon(master.prove_as_master("porch"))
        assert isinstance(await worker.next(), ClusterKeyError)


async def test_a_relay_that_answers_itself_is_found_out_by_the_master() -> None:
    async def answer(master: Side, worker: Side) -> None:
        theirs = await master.preface()
        master.writer.write(Preface(bytes(32), STRANGER.certificate).encode())
        await master.start_tls(STRANGER, theirs.certificate, server=True)
        proof = (await master.read(64))[32:]
        master.write(proof)  # what it has heard is what it can say

    async with door() as worker, between(worker.address, answer) as address, keyed(address) as master:
        with pytest.raises(ClusterKeyError, match="does not know the cluster key, or another sits between"):
            await soon(master.prove_as_master("porch"))
        assert isinstance(await worker.next(), ConnectionLostError)


async def test_a_relay_that_swaps_one_certificate_and_leaves_tls_alone() -> None:
    async def swap(master: Side, worker: Side) -> None:
        theirs = await master.preface()
        worker.writer.write(theirs.encode())
        master.writer.write(Preface((await worker.preface()).nonce, STRANGER.certificate).encode())
        worker.writer.write(await master.reader.read(4096))
        master.writer.write(await worker.reader.read(4096))
        await master.reader.read()

    async with door() as worker, between(worker.address, swap) as address, keyed(address) as master:
        with pytest.raises(ClusterKeyError, match=r"not to be reached in private: TLS failed \(CERTIFICATE"):
            await soon(master.prove_as_master("porch"))
        master.abort()
        assert isinstance(await worker.next(), ConnectionLostError)


async def test_a_recorded_handshake_opens_nothing() -> None:
    recorded: list[bytes] = []

    async with door() as worker:
        async with between(worker.address, record(recorded)) as address, keyed(address) as master:
            await soon(master.prove_as_master("porch"))
            await master.send(HELLO)
            accepted = await worker.next()
            assert isinstance(accepted, Connection)
            assert (await soon(accepted.receive())).message == HELLO
            await soon(master.close())
            accepted.abort()
        assert b"porch" not in b"".join(recorded)
        async with raw(worker.address) as replayer:
            await soon(repeat(recorded, replayer.reader, replayer.writer))
            assert isinstance(await worker.next(), ProtocolError)
