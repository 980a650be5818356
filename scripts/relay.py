"""A TCP relay that makes loopback behave like a slower link, and fail when told to.

    async with Relay(("127.0.0.1", 10128), delay=0.02, rate=50e6) as relay:
        ...  # connect to relay.address instead; relay.freeze(), .thaw(), .cut(), .restore()

It runs in the caller's event loop; `netsim.py` is the same as a command. What is read at one end waits in
a `Flow` until it is due at the other. Bytes leave through the `Lane`, the bottleneck that all connections
share in one direction, no faster than its rate, and travel for the delay after that. They are read from
the sender only while the flow has room, so that a sender who is too fast has to wait, as TCP would have it.

What it does not show: a sender sees its connection made at once and, where nobody listens at the far end,
reset rather than refused; nothing is lost and sent again, for which jitter has to stand.
"""

import asyncio
import functools
import logging
import os
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from relay_flow import End, Flow, reset

from cake.topology import format_address

_log = logging.getLogger("relay")

QUEUE_BYTES = 256 * 1024  # before the bottleneck, as in a home's router
UNLIMITED_RATE = 10e9  # bits per second that a link without a rate is given room for
LARGEST_PART = 64 * 1024
SMALLEST_PART = 1460  # a packet's worth
PART_S = 0.001


@dataclass
class Conditions:
    """How a link is. A change counts for the bytes that come after it."""

    delay: float = 0.0  # seconds, each way
    jitter: float = 0.0  # seconds by which the delay is at most longer or shorter; anew for each read
    rate: float | None = None  # bits of payload per second, each way; None: no limit

    @property
    def room(self) -> int:
        """Bytes that a connection may have under way in one direction: a queue, and what fills the link."""
        return QUEUE_BYTES + int((self.rate or UNLIMITED_RATE) / 8 * (self.delay + self.jitter))


class Lane:
    """One direction of a link."""

    def __init__(self, conditions: Conditions, seed: str | None) -> None:
        self.frozen = False
        self.bytes = 0
        self._conditions = conditions
        self._random = random.Random(seed)
        self._free_at = 0.0

    @property
    def room(self) -> int:
        """Bytes that one flow may hold."""
        return self._conditions.room

    def schedule(self, now: float, n_bytes: int) -> Iterator[tuple[float, int]]:
        """When the parts of what was read at `now` are due at the far end, each with its number of bytes."""
        jitter, rate = self._conditions.jitter, self._conditions.rate
        delay = max(0.0, self._conditions.delay + self._random.uniform(-jitter, jitter))
        self.bytes += n_bytes
        if rate is None:
            yield now + delay, n_bytes
            return
        part = min(max(int(PART_S * rate / 8), SMALLEST_PART), LARGEST_PART)
        for start in range(0, n_bytes or 1, part):
            size = min(part, n_bytes - start)
            self._free_at = max(now, self._free_at) + 8 * size / rate
            yield self._free_at + delay, size

    def postpone(self, seconds: float) -> None:
        """The bottleneck stood still for so long."""
        self._free_at += seconds


class Relay:
    """A link: one address to listen on and one to pass everything on to."""

    def __init__(
        self,
        to: tuple[str, int],
        *,
        delay: float = 0.0,
        jitter: float = 0.0,
        rate: float | None = None,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        seed: int | None = None,
    ) -> None:
        """Entering the context listens; it raises `OSError` where that address cannot be had."""
        self.to, self.address = to, listen
        self.conditions = Conditions(delay, jitter, rate)
        names = [None if seed is None else f"{seed} {way}" for way in ("there", "back")]
        self._there, self._back = (Lane(self.conditions, name) for name in names)
        self._ends: set[End] = set()
        self._dials: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._frozen_at: float | None = None
        self._thawed = asyncio.Event()
        self._thawed.set()

    async def __aenter__(self) -> "Relay":
        self._listener = bound(self.address)
        self.address = self._listener.getsockname()[:2]
        self.restore()
        return self

    async def __aexit__(self, *_: object) -> None:
        accepting = self._accepting
        self._drop_everything()
        waiting = [*self._dials, *filter(None, [accepting])]
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*(end.lost.wait() for end in self._ends))

    @property
    def state(self) -> str:
        """`cut`, `frozen` or `open`."""
        if self._accepting is None:
            return "cut"
        return "open" if self._frozen_at is None else "frozen"

    @property
    def connections(self) -> int:
        """How many go through, from the sender's connecting on."""
        return (len(self._ends) + 1) // 2 + len(self._dials)

    @property
    def bytes(self) -> tuple[int, int]:
        """How many were read from those who connected, and from whom they connected to."""
        return self._there.bytes, self._back.bytes

    def cut(self) -> None:
        """Reset all connections and refuse new ones."""
        if self._accepting is not None:
            self._drop_everything()
            self._listener = bound(self.address)  # keeps the port, and refuses as it does not listen

    def restore(self) -> None:
        """Accept connections (again)."""
        if self._accepting is None:
            self._listener.listen()
            self._accepting = asyncio.get_running_loop().create_task(self._accept())

    def freeze(self) -> None:
        """Let no byte through and no end see anything, as when a laptop leaves the Wi-Fi for a while."""
        if self._frozen_at is None:
            self._frozen_at = asyncio.get_running_loop().time()
            self._thawed.clear()
            self._there.frozen = self._back.frozen = True
            for end in self._ends:
                end.out_of.regulate()

    def thaw(self) -> None:
        """Let everything go on where it stood."""
        if self._frozen_at is not None:
            pause = asyncio.get_running_loop().time() - self._frozen_at
            self._frozen_at = None
            self._thawed.set()
            for lane in (self._there, self._back):
                lane.frozen = False
                lane.postpone(pause)
            for end in self._ends:
                end.out_of.postpone(pause)

    def _drop_everything(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
        self._listener.close()
        for dial in self._dials:
            dial.cancel()
        for end in self._ends:
            end.reset()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            near, _ = await loop.sock_accept(self._listener)
            near.setblocking(False)
            dial = loop.create_task(self._dial(near))
            self._dials.add(dial)
            dial.add_done_callback(functools.partial(self._dialled, near))

    async def _dial(self, near: socket.socket) -> None:
        """Pair an accepted socket with a connection to the far end, which takes a round trip to make."""
        loop = asyncio.get_running_loop()
        there, back = Flow(self._there), Flow(self._back)
        try:
            await asyncio.sleep(2 * self.conditions.delay)
            await self._thawed.wait()
            await loop.create_connection(lambda: End(back, there, self._ends), *self.to)
            await loop.connect_accepted_socket(lambda: End(there, back, self._ends), near)
        except BaseException:
            there.close()
            back.close()
            raise

    def _dialled(self, near: socket.socket, dial: "asyncio.Task[None]") -> None:
        """A callback, as a task that is cancelled before its first step could not reset the socket itself."""
        self._dials.discard(dial)
        error = None if dial.cancelled() else dial.exception()
        if error is not None:
            _log.warning("%s cannot be reached: %s", format_address(*self.to), error)
        if error is not None or dial.cancelled():
            reset(near)


def bound(address: tuple[str, int]) -> socket.socket:
    """A socket at an address that does not listen yet. Raises `OSError`."""
    family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        if os.name == "posix":  # elsewhere the option means something else
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
