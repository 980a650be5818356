"""What strangers and broken programs do to an open port, done to a real worker: `chaos.py` runs these.

After each of them a good master must be served at once, and the worker's memory must be where it was.
"""

import asyncio
import contextlib
import random
import struct
import time
from collections.abc import Awaitable, Callable

from faults import Device, Ending, Play, node, tell_first

from cake.protocol.frames import MAGIC, PREFIX, encode
from cake.protocol.handshake import hello
from cake.topology import Topology

NAME = "first"
AT_ONCE_S = 1.0
FLAT = 1.05
N_IDLE = 1000


@contextlib.asynccontextmanager
async def stranger(
    device: Device,
) -> "contextlib.AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]":
    """A bare connection."""
    reader, writer = await asyncio.open_connection(device.node.host, device.node.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def connect_and_close(device: Device) -> None:
    """And nothing said."""
    async with stranger(device):
        pass


async def hello_and_gone(device: Device) -> None:
    """Gone before the answer."""
    async with stranger(device) as (_, writer):
        writer.writelines(encode(hello(NAME)))
        await writer.drain()


def says(data: bytes, stay: float = 0.2) -> Callable[[Device], Awaitable[None]]:
    """Bytes, and then the sender waits for what comes."""

    async def act(device: Device) -> None:
        async with stranger(device) as (reader, writer):
            writer.write(data)
            with contextlib.suppress(asyncio.TimeoutError, ConnectionError):
                await asyncio.wait_for(reader.read(), stay)

    return act


async def port_scan(device: Device) -> None:
    """Two hundred connections that are reset at once."""
    for _ in range(200):
        async with stranger(device):
            pass


ACTS: dict[str, Callable[[Device], Awaitable[None]]] = {
    "connect and close": connect_and_close,
    "a hello and gone": hello_and_gone,
    "an HTTP GET": says(b"GET / HTTP/1.1\r\nHost: cake\r\n\r\n"),
    "a port scan": port_scan,
    "1 KB of noise": says(random.Random(0).randbytes(1024)),
    "a length of 2^63": says(struct.pack(">4sIQ", MAGIC, 16, 2**63)),
    "3 GB announced, 64 bytes sent": says(struct.pack(">4sIQ", MAGIC, 16, 3 << 30) + bytes(64)),
}


async def rude_strangers(play: Play) -> Ending:
    """Each of the acts, and a good master right after it."""
    with play.cast(node(NAME, 0, 29)) as topology:
        device, slowest = play.devices[NAME], 0.0
        await served(play, topology)
        before = await device.settled_bytes()
        for act in ACTS.values():
            for _ in range(3):
                await act(device)
            slowest = max(slowest, await served(play, topology))
        after = await device.settled_bytes()
    seen = f"{len(ACTS)} kinds; a master connects within {1e3 * slowest:.0f} ms; {growth(before, after)}"
    return Ending(slowest <= AT_ONCE_S and after <= FLAT * before, seen)


async def crowd(play: Play) -> Ending:
    """A thousand idle connections, slow senders, half-closed sockets and frames too long, all at once."""
    with play.cast(node(NAME, 0, 29)) as topology:
        device = play.devices[NAME]
        await served(play, topology)
        before = await device.settled_bytes()
        async with contextlib.AsyncExitStack() as stack:
            drips = []
            for i in range(N_IDLE):
                _, writer = await stack.enter_async_context(stranger(device))
                if i % 10 == 1:
                    drips.append(asyncio.create_task(_drip(writer)))
                elif i % 10 == 2:
                    writer.write_eof()
                elif i % 10 == 3:
                    writer.write(PREFIX.pack(MAGIC, 2**32 - 1, 2**40))
            took = [await _connected(play, topology) for _ in range(3)]
            for drip in drips:
                drip.cancel()
        after = await device.settled_bytes()
    seen = f"{N_IDLE} connections; a master connects within {1e3 * max(took):.0f} ms; {growth(before, after)}"
    return Ending(max(took) <= AT_ONCE_S, seen)


async def _drip(writer: asyncio.StreamWriter) -> None:
    """A hello, a byte at a time."""
    with contextlib.suppress(ConnectionError):
        for byte in b"".join(map(bytes, encode(hello(NAME)))):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.5)


async def _connected(play: Play, topology: Topology) -> float:
    """Seconds until a good master has its welcome; then it leaves."""
    reader, writer = await asyncio.open_connection(topology.nodes[NAME].host, topology.nodes[NAME].port)
    started = time.perf_counter()
    writer.writelines(encode(hello(NAME)))
    assert await reader.read(1)
    took = time.perf_counter() - started
    writer.close()
    return took


async def served(play: Play, topology: Topology) -> float:
    """Seconds until a good master has its welcome; its text is checked for being there at all."""
    async with play.master(topology) as generator:
        await tell_first(generator, play.prompt())
    return await _connected(play, topology)


def growth(before: int, after: int) -> str:
    """In words."""
    return f"memory {before / 1e6:.0f} MB, then {after / 1e6:.0f} MB"


INTRUDERS = {
    "rude strangers": rude_strangers,
    "a crowd": crowd,
}
