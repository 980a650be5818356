"""Someone who sits between a master and a worker, and has no key: reads along, swaps, repeats."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

from cake.net.connection import ConnectionLostError
from cake.net.tls import Credentials, Tls
from cake.protocol.cluster_key import HEAD, Preface, read_head

Address: TypeAlias = tuple[str, int]


class Side:
    """One side of a relay: TLS over a stream, with no manners of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._plain = bytearray()

    async def preface(self) -> Preface:
        """What this side begins with."""
        nonce, length = read_head(await self.reader.readexactly(HEAD.size))
        return Preface(nonce, await self.reader.readexactly(length))

    async def start_tls(self, own: Credentials, certificate: bytes, server: bool) -> None:
        """TLS with this side, which has shown that certificate."""
        self._tls = Tls(own.context(certificate, server), server)
        while True:
            self.writer.write(self._tls.outgoing.read())
            if self._tls.established:
                return
            self._plain += b"".join(map(bytes, self._tls.decrypt(await self.reader.read(4096))))

    async def read(self, n_bytes: int) -> bytes:
        """What it says inside TLS."""
        while len(self._plain) < n_bytes:
            data = await self.reader.read(4096)
            if not data:
                raise ConnectionLostError("it hung up")
            self._plain += b"".join(map(bytes, self._tls.decrypt(data)))
        data, self._plain = bytes(self._plain[:n_bytes]), self._plain[n_bytes:]
        return data

    def write(self, data: bytes) -> None:
        """Say something inside TLS."""
        self.writer.writelines(self._tls.encrypt(data))


Behaviour: TypeAlias = Callable[[Side, Side], Awaitable[None]]


@contextlib.asynccontextmanager
async def between(worker: Address, behave: Behaviour) -> AsyncIterator[Address]:
    """Where a master has to connect for the meddler to sit between it and the worker."""
    tasks: list[asyncio.Task[None]] = []

    async def sit(master: Side) -> None:
        other = Side(*await asyncio.open_connection(*worker))
        try:
            with contextlib.suppress(OSError):
                await behave(master, other)
        finally:
            master.writer.close()
            other.writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.create_task(sit(Side(reader, writer))))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()
        await asyncio.wait_for(asyncio.gather(*tasks), 30)
    finally:
        server.close()


def swap_certificates(own: Credentials) -> Behaviour:
    """Give each side the meddler's certificate; the nonces and proofs are theirs."""

    async def swap(master: Side, worker: Side) -> None:
        theirs = await master.preface()
        worker.writer.write(Preface(theirs.nonce, own.certificate).encode())
        answer = await worker.preface()
        master.writer.write(Preface(answer.nonce, own.certificate).encode())
        await asyncio.gather(
            master.start_tls(own, theirs.certificate, server=True),
            worker.start_tls(own, answer.certificate, server=False),
        )
        worker.write(await master.read(64))
        master.write(await worker.read(32))

    return swap


def record(said: list[bytes]) -> Behaviour:
    """Change nothing, and keep what the master says."""

    async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, keep: bool) -> None:
        while data := await source.read(4096):
            if keep:
                said.append(data)
            target.write(data)
        target.close()

    async def carry_both(master: Side, worker: Side) -> None:
        await asyncio.gather(
            carry(master.reader, worker.writer, True), carry(worker.reader, master.writer, False)
        )

    return carry_both


async def repeat(said: list[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say to a worker what a master once said, and wait until it hangs up."""
    writer.write(said[0])
    _, length = read_head(await reader.readexactly(HEAD.size))
    await reader.readexactly(length)
    writer.writelines(said[1:])
    with contextlib.suppress(ConnectionError):
        await reader.read()
