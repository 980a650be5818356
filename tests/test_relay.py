"""The relay that stands in for a slow network, over real sockets.

What it does takes time by its nature: that something took at least as long as asked is certain; how much
longer depends on the machine, and only what no machine should exceed is refused.
"""

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
from alarm import FileAlarm, LoopAlarm
from relay import QUEUE_BYTES, Relay
from relay_flow import linger_not

T = TypeVar("T")
Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]

FAR_TOO_LONG_S = 20
MEGABYTE = random.Random(0).randbytes(2**20)


async def soon(promise: Awaitable[T]) -> T:
    """What must come."""
    return await asyncio.wait_for(promise, FAR_TOO_LONG_S)


class Link:
    """A relay, and the connections that reach its far end."""

    def __init__(self, relay: Relay, arrivals: "asyncio.Queue[Peer]") -> None:
        self.relay, self.arrivals = relay, arrivals
        self._writers: list[asyncio.StreamWriter] = []

    async def dial(self) -> Peer:
        """A connection to the relay."""
        peer = await soon(asyncio.open_connection(*self.relay.address))
        self._writers.append(peer[1])
        return peer

    async def connect(self) -> tuple[Peer, Peer]:
        """A connection to the relay, and its other end."""
        near = await self.dial()
        far = await soon(self.arrivals.get())
        self._writers.append(far[1])
        return near, far

    async def close(self) -> None:
        """Close whatever has been connected."""
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)


@asynccontextmanager
async def linked(**conditions: Any) -> AsyncIterator[Link]:
    """A relay to a server of this test."""
    arrivals: asyncio.Queue[Peer] = asyncio.Queue()

    async def arrive(*peer: Any) -> None:
        arrivals.put_nowait(peer)

    async with (
        await asyncio.start_server(arrive, "127.0.0.1", 0) as server,
        Relay(server.sockets[0].getsockname(), **conditions) as relay,
    ):
        link = Link(relay, arrivals)
        try:
            yield link
        finally:
            await link.close()


async def carry(sender: Peer, receiver: Peer, data: bytes) -> float:
    """Send through the relay, and see that it arrives; the seconds that it took."""
    started = time.monotonic()
    sender[1].write(data)
    assert await soon(receiver[0].readexactly(len(data))) == data
    return time.monotonic() - started


@pytest.mark.parametrize(
    "conditions",
    [
        {},
        {"delay": 0.005, "jitter": 0.005, "seed": 1},
        {"delay": 0.002, "jitter": 0.004, "rate": 100e6},
        {"rate": 2e9},
    ],
)
async def test_bytes_arrive_whole_and_in_order_both_ways(conditions: dict[str, Any]) -> None:
    async with linked(**conditions) as link:
        near, far = await link.connect()
        await asyncio.gather(carry(near, far, MEGABYTE), carry(far, near, MEGABYTE[::-1]))
        assert link.relay.bytes == (len(MEGABYTE), len(MEGABYTE))


async def test_the_delay_is_one_way_and_at_least_what_was_asked() -> None:
    async with linked(delay=0.03) as link:
        near, far = await link.connect()
        times = [await carry(near, far, b"there") for _ in range(5)]
        times += [await carry(far, near, b"back") for _ in range(5)]
        assert min(times) >= 0.03
        assert min(times) < 0.06  # it is not paid twice
        link.relay.conditions.delay = 0.0
        assert min([await carry(near, far, b"there") for _ in range(5)]) < 0.03


async def test_a_connection_takes_a_round_trip_to_make() -> None:
    async with linked(delay=0.03) as link:
        started = time.monotonic()
        await link.connect()
        assert time.monotonic() - started >= 0.06


async def test_jitter_lengthens_and_shortens() -> None:
    async with linked(delay=0.02, jitter=0.02, seed=3) as link:
        near, far = await link.connect()
        times = [await carry(near, far, b"x") for _ in range(20)]
        assert min(times) < 0.02 < max(times)


async def test_the_rate_is_not_exceeded_each_way() -> None:
    rate = 40e6
    async with linked(rate=rate) as link:
        near, far = await link.connect()
        both = await asyncio.gather(carry(near, far, MEGABYTE), carry(far, near, MEGABYTE))
        least = 8 * len(MEGABYTE) / rate
        assert min(both) >= least
        assert max(both) < 5 * least


async def test_connections_share_the_rate() -> None:
    rate = 80e6
    async with linked(rate=rate) as link:
        pairs = [await link.connect() for _ in range(2)]
        times = await asyncio.gather(*(carry(near, far, MEGABYTE) for near, far in pairs))
        assert max(times) >= 2 * 8 * len(MEGABYTE) / rate


@pytest.mark.parametrize("conditions", [{"rate": 1e6}, {}])
async def test_a_sender_who_is_faster_than_the_link_or_its_reader_has_to_wait(
    conditions: dict[str, float],
) -> None:
    async with linked(**conditions) as link:
        near, far = await link.connect()
        near[1].write(64 * MEGABYTE)
        with pytest.raises(asyncio.TimeoutError):  # the link would take minutes, and the reader does not read
            await asyncio.wait_for(near[1].drain(), 0.3)
        read_by_nobody = 8 * 2**20  # what the far end's kernel may hold
        assert link.relay.bytes[0] < 2 * QUEUE_BYTES + read_by_nobody * (not conditions)
        if not conditions:
            assert await soon(far[0].readexactly(64 * 2**20)) == 64 * MEGABYTE
        near[1].transport.abort()


async def test_the_end_of_one_direction_is_passed_on_alone() -> None:
    async with linked(delay=0.01) as link:
        near, far = await link.connect()
        near[1].write(b"the last")
        near[1].write_eof()
        assert await soon(far[0].read()) == b"the last"
        await carry(far, near, MEGABYTE)
        far[1].write_eof()
        assert await soon(near[0].read()) == b""
        await until(lambda: link.relay.connections == 0)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the relay has no reason to tell."""

    async def watch() -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)

    await soon(watch())


async def test_a_reset_is_passed_on() -> None:
    async with linked(delay=0.01) as link:
        near, far = await link.connect()
        linger_not(near[1].get_extra_info("socket"))
        near[1].transport.abort()
        with pytest.raises(ConnectionResetError):
            await soon(far[0].read(1))
        await until(lambda: link.relay.connections == 0)


async def test_cut_resets_and_refuses_until_restored() -> None:
    async with linked(delay=0.01) as link:
        near, far = await link.connect()
        await carry(near, far, b"x")
        link.relay.cut()
        for reader, _ in (near, far):
            with pytest.raises(ConnectionResetError):
                await soon(reader.read(1))
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                await link.dial()
            link.relay.cut()
        assert link.relay.state == "cut"
        link.relay.restore()
        await carry(*await link.connect(), MEGABYTE)


async def test_cut_resets_what_is_not_connected_through_yet() -> None:
    async with linked(delay=FAR_TOO_LONG_S) as link:
        reader, _ = await link.dial()
        await until(lambda: link.relay.connections == 1)
        link.relay.cut()
        with pytest.raises(ConnectionResetError):
            await soon(reader.read(1))


async def test_cut_and_restore_at_once() -> None:
    async with linked() as link:
        near, _ = await link.connect()
        for _ in range(10):
            link.relay.cut()
            link.relay.restore()
        with pytest.raises(ConnectionResetError):
            await soon(near[0].read(1))
        await carry(*await link.connect(), b"x")


async def test_freeze_lets_nothing_through_and_thaw_everything() -> None:
    async with linked(rate=200e6) as link:
        near, far = await link.connect()
        await carry(near, far, b"x")
        sending = [asyncio.create_task(carry(*way, MEGABYTE)) for way in ((near, far), (far, near))]
        await asyncio.sleep(0)
        link.relay.freeze()
        newcomer = await link.dial()
        newcomer[1].write(b"hello")
        done, _ = await asyncio.wait(sending, timeout=0.2)  # without the freeze it takes 0.04
        assert not done
        assert link.arrivals.empty()
        assert link.relay.state == "frozen"
        link.relay.thaw()
        await asyncio.gather(*sending)
        arrived = await soon(link.arrivals.get())
        assert await soon(arrived[0].readexactly(5)) == b"hello"
        arrived[1].close()


async def test_a_link_that_has_thawed_keeps_to_its_rate() -> None:
    rate, pause = 20e6, 0.1
    async with linked(rate=rate) as link:
        near, far = await link.connect()
        sending = asyncio.create_task(carry(near, far, MEGABYTE))
        await until(lambda: link.relay.bytes[0] > 0)
        link.relay.freeze()
        await asyncio.wait([sending], timeout=pause)
        link.relay.thaw()
        assert await sending >= 8 * len(MEGABYTE) / rate + pause


async def test_nobody_at_the_far_end_is_a_reset(caplog: pytest.LogCaptureFixture) -> None:
    async with linked() as link:
        link.relay.to = ("127.0.0.1", 1)
        reader, _ = await link.dial()
        with pytest.raises(ConnectionResetError):
            await soon(reader.read(1))
        assert "127.0.0.1:1 cannot be reached" in caplog.text


@pytest.mark.parametrize("kind", [LoopAlarm, FileAlarm])
async def test_an_alarm_never_rings_early(kind: Any) -> None:
    if kind is FileAlarm and sys.platform != "linux":
        pytest.skip("only Linux has them")
    loop, rung = asyncio.get_running_loop(), asyncio.Event()
    alarm = kind(rung.set)
    for pause in (0.0105, 0.0, -1.0, -loop.time()):
        rung.clear()
        when = loop.time() + pause
        alarm.set(loop.time() + FAR_TOO_LONG_S)
        alarm.set(when)
        await soon(rung.wait())
        assert loop.time() >= when
    alarm.set(loop.time())
    alarm.close()
    rung.clear()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(rung.wait(), 0.05)
