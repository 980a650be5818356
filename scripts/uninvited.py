"""Those who want in without the cluster key, done to a real worker that has one: `chaos.py` runs this.

Each kind comes to a worker of its own, for after three failures an address has to wait longer on purpose.
"""

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

from faults import Device, Ending, Play, node, tell_first
from intruders import stranger
from meddler import between, record, repeat, swap_certificates

from cake.errors import ClusterKeyError
from cake.net.connection import Connection, connect
from cake.net.keyed import WANTS_A_KEY, KeyedConnection, new_connection
from cake.net.tls import Credentials, new_credentials
from cake.protocol.handshake import hello
from cake.protocol.messages import Goodbye

NAME = "first"
KEY = "a key for this play alone, and no other"
OURS, ANOTHER = new_credentials(KEY), new_credentials("another key for this play")
TIMES = 3  # as often as nobody is made to wait
HUNG_UP_S = 3.0
ALIKE_S = 0.05  # by which the times of refusals may differ

Attempt = Callable[[Device], Awaitable[bool]]  # whether the guest was refused, and heard nothing but that


async def another_key(device: Device, port: int | None = None, own: Credentials = ANOTHER) -> bool:
    """A master whose key is `own`, at the worker's port or another."""
    async with opened(device, own, port) as master:
        assert isinstance(master, KeyedConnection)
        try:
            await master.prove_as_master(NAME)
        except ClusterKeyError:
            return True
        return False


async def no_key(device: Device) -> bool:
    """A master without one hears that the worker wants one, and no more."""
    async with opened(device, None) as master:
        await master.send(hello(NAME))
        message = (await master.receive()).message
        return message == Goodbye(WANTS_A_KEY)


async def swapped(device: Device) -> bool:
    """A master with the key, and between the two one who shows each a certificate of its own."""
    here = (device.node.host, device.node.port)
    async with between(here, swap_certificates(ANOTHER)) as (_, port):
        return await another_key(device, port, OURS)


async def replayed(said: list[bytes], device: Device) -> bool:
    """What a good master said, hello and all, once more; whoever is let in is not hung up on."""
    async with stranger(device) as (reader, writer):
        try:
            await asyncio.wait_for(repeat(said, reader, writer), HUNG_UP_S)
        except asyncio.TimeoutError:
            return False
        return True


@contextlib.asynccontextmanager
async def opened(
    device: Device, credentials: Credentials | None, port: int | None = None
) -> "contextlib.AsyncIterator[Connection]":
    """A connection that has said nothing yet."""
    new = partial(new_connection, credentials=credentials)
    connection = await connect(device.node.host, port or device.node.port, new)
    try:
        yield connection
    finally:
        connection.abort()


async def recorded(device: Device) -> list[bytes]:
    """What a good master says."""
    said: list[bytes] = []
    here = (device.node.host, device.node.port)
    async with between(here, record(said)) as (_, port), opened(device, OURS, port) as master:
        assert isinstance(master, KeyedConnection)
        await master.prove_as_master(NAME)
        await master.send(hello(NAME))
        await master.receive()
    return said


async def uninvited(play: Play) -> Ending:
    """Each kind three times; then a good master."""
    kinds: dict[str, Attempt | None] = {
        "another key": another_key,
        "no key": no_key,
        "certificates swapped": swapped,
        "replayed": None,
    }
    held, took = True, dict[str, float]()
    for name, attempt in kinds.items():
        with cluster_key(), play.cast(node(NAME, 0, 29)) as topology:
            device = play.devices[NAME]
            guest = attempt or partial(replayed, await recorded(device))
            times = []
            for _ in range(TIMES):
                started = time.perf_counter()
                held &= await guest(device)
                times.append(time.perf_counter() - started)
            took[name] = statistics.median(times)
            async with play.master(topology, credentials=OURS) as generator:
                await tell_first(generator, play.prompt())
            held &= sum("turned away" in line for line in device.said) == TIMES
    told = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in took.items())
    alike = max(took.values()) - min(took.values()) <= ALIKE_S
    return Ending(held and alike, f"{TIMES} of {TIMES} refused and logged each; {told}")


@contextlib.contextmanager
def cluster_key() -> Iterator[None]:
    """For the processes that are started meanwhile."""
    os.environ["CAKE_CLUSTER_KEY"] = KEY
    try:
        yield
    finally:
        del os.environ["CAKE_CLUSTER_KEY"]
