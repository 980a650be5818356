"""What strangers and broken programs do to an open port, done to a real worker: `chaos.py` runs these.

After each of them a good master must be served at once, and the worker's memory must be where it was.
"""

import asyncio
import contextlib
import random
import struct
import time
from collections.abc import Awaitable, Callable, Iterator

from faults import Device, Ending, Play, node, tell, tell_first

from cake.protocol.frames import MAGIC, PREFIX, encode
from cake.protocol.handshake import hello
from cake.protocol.messages import (
    Alive,
    Forget,
    Forward,
    Goodbye,
    Hello,
    Link,
    Message,
    Result,
    StageReport,
    Welcome,
    WireSegment,
    WireTensor,
)
from cake.topology import Topology

NAME = "first"
HIDDEN_SIZE = 576
AT_ONCE_S = 1.0
FLAT = 1.05
N_IDLE = 1000
LANES = 8  # connections over which mutated frames go at once


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
        await _served(play, topology)
        before = await device.settled_bytes()
        for act in ACTS.values():
            for _ in range(3):
                await act(device)
            slowest = max(slowest, await _served(play, topology))
        after = await device.settled_bytes()
    seen = f"{len(ACTS)} kinds; a master connects within {1e3 * slowest:.0f} ms; {_growth(before, after)}"
    return Ending(slowest <= AT_ONCE_S and after <= FLAT * before, seen)


async def crowd(play: Play) -> Ending:
    """A thousand idle connections, slow senders, half-closed sockets and frames too long, all at once."""
    with play.cast(node(NAME, 0, 29)) as topology:
        device = play.devices[NAME]
        await _served(play, topology)
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
    seen = (
        f"{N_IDLE} connections; a master connects within {1e3 * max(took):.0f} ms; {_growth(before, after)}"
    )
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


async def _served(play: Play, topology: Topology) -> float:
    """Seconds until a good master has its welcome; its text is checked for being there at all."""
    async with play.master(topology) as generator:
        await tell_first(generator, play.prompt())
    return await _connected(play, topology)


def _growth(before: int, after: int) -> str:
    return f"memory {before / 1e6:.0f} MB, then {after / 1e6:.0f} MB"


# Mutated frames.

TENSOR = WireTensor("float32", (1, HIDDEN_SIZE), bytes(4 * HIDDEN_SIZE))
REPORT = StageReport(0.0, 0.001, 1.0, 2400)
SPOKEN: list[Message] = [
    hello(NAME),
    Forward(1, 0, (WireSegment(0, 0, 1, 0),), (), (), TENSOR),
    Forward(2, 0, (WireSegment(1, 0, 1, 1),), (), (REPORT,), TENSOR),
    Link(3, NAME, "127.0.0.1", 1, "nobody"),
    Forget((0, 1)),
    Alive(),
    Goodbye("enough"),
    Result(1, (REPORT,), TENSOR),
    Welcome(3, "cake", NAME, "m", (), "cpu", "float32", "float32", 512, 2048, "", 0.0),
    Hello(2, "cake", NAME, ""),
]


def mutated(chance: random.Random, frame: bytes) -> bytes:
    """The frame with something wrong in it, mostly near its beginning, where it is read with care."""
    data = bytearray(frame)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = min(int(chance.expovariate(1 / 60)), len(data) - 1)
        kind = chance.randrange(5)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place] = chance.choice((0, 1, 0x7F, 0x80, 0xC0, 0xDF, 0xFF))
        elif kind == 2:
            del data[place : place + chance.randint(1, 8)]
        elif kind == 3:
            data[place:place] = chance.randbytes(chance.randint(1, 8))
        else:
            other = random.Random(chance.random()).choice(FRAMES)
            data[place:] = other[place:]
        if not data:
            return b"\0"
    return bytes(data)


FRAMES = [b"".join(map(bytes, encode(message))) for message in SPOKEN]


async def mutated_frames(play: Play, n: int = 100_000) -> Ending:
    """Mutations of every message, before and after the handshake, beside a master that answers."""
    with play.cast(node(NAME, 0, 29)) as topology:
        device, numbers = play.devices[NAME], iter(range(n))
        async with play.master(topology) as generator:
            right = (await tell(generator, play.prompt())).ids
            before = await device.settled_bytes()
            lanes = [asyncio.create_task(_lane(device, numbers, seed)) for seed in range(LANES)]
            same = total = 0
            while not all(lane.done() for lane in lanes):
                total += 1
                same += (await tell(generator, play.prompt())).ids == right
            await asyncio.gather(*lanes)
        await _served(play, topology)
        after = await device.settled_bytes()
    seen = f"{n} frames; {same} of {total} texts beside them identical; {_growth(before, after)}"
    return Ending(same == total and after <= FLAT * before, seen)


async def _lane(device: Device, numbers: Iterator[int], seed: int) -> None:
    """Connections one after another, each with frames until it is closed."""
    chance = random.Random(seed)
    for _ in numbers:
        with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
            async with stranger(device) as (reader, writer):
                if chance.random() < 0.8:
                    writer.write(FRAMES[0])
                await _until_closed(reader, writer, chance, numbers)


async def _until_closed(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chance: random.Random, numbers: Iterator[int]
) -> None:
    writer.write(mutated(chance, chance.choice(FRAMES)))
    for _ in range(16):
        try:
            heard = await asyncio.wait_for(reader.read(65536), 0.02)
        except asyncio.TimeoutError:
            heard = b"?"  # it waits for more
        if not heard or next(numbers, None) is None:
            return
        writer.write(mutated(chance, chance.choice(FRAMES)))


INTRUDERS = {
    "rude strangers": rude_strangers,
    "a crowd": crowd,
    "mutated frames": mutated_frames,
}
