"""What a relayed connection consists of: two ends, and a flow of bytes from each to the other."""

import asyncio
import contextlib
import socket
import struct
import sys
from collections import deque
from collections.abc import Iterator
from typing import Protocol, cast

from alarm import new_alarm

READ_BYTES = 64 * 1024
KERNEL_BYTES = 256 * 1024  # in each of the relay's socket buffers, where the system would let megabytes wait


class Lane(Protocol):
    """What a flow goes along."""

    frozen: bool

    @property
    def room(self) -> int:
        """Bytes that a flow may hold before no more are read."""

    def schedule(self, now: float, n_bytes: int) -> Iterator[tuple[float, int]]:
        """When the parts of what was read at `now` are due, each with its number of bytes."""


class Flow:
    """One direction of a connection: what was read at its source waits here until it is due at its target.

    Beside bytes, what can wait is the end of them, `b""`, and a reset, None.
    """

    def __init__(self, lane: Lane) -> None:
        self.source: End | None = None
        self.target: End | None = None
        self._lane = lane
        self._loop = asyncio.get_running_loop()
        self._alarm = new_alarm(self.deliver)
        self._waiting: deque[tuple[float, bytes | None]] = deque()
        self._held = 0
        self._latest = 0.0
        self._closed = False

    def push(self, item: bytes | None) -> None:
        """Take what has just been read."""
        if self._closed:
            return
        start = 0
        for due, size in self._lane.schedule(self._loop.time(), len(item or b"")):
            self._latest = max(due, self._latest)  # jitter never reorders
            part = item if item is None or size == len(item) else item[start : start + size]
            self._waiting.append((self._latest, part))
            start += size
        self._held += start
        self.deliver()

    def deliver(self) -> None:
        """Hand over what is due, and set the alarm for the rest."""
        target = self.target
        if target is not None and not self._closed:
            while self._may_deliver(target) and self._waiting[0][0] <= self._loop.time():
                _, item = self._waiting.popleft()
                self._held -= len(item or b"")
                target.take(item)
            if self._may_deliver(target):
                self._alarm.set(self._waiting[0][0])
        self.regulate()

    def _may_deliver(self, target: "End") -> bool:
        return bool(self._waiting) and target.writable and not self._lane.frozen

    def regulate(self) -> None:
        """Read from the source while there is room."""
        if self.source is not None:
            self.source.read_on(not self._lane.frozen and self._held < self._lane.room)

    def postpone(self, seconds: float) -> None:
        """The lane stood still for so long, and moves again."""
        self._latest += seconds
        self._waiting = deque((due + seconds, item) for due, item in self._waiting)
        self.deliver()

    def close(self) -> None:
        """The target is gone: forget what waits, and what may come."""
        self._closed = True
        self._waiting.clear()
        self._held = 0
        self._alarm.close()


class End(asyncio.BufferedProtocol):
    """One of a connection's two sockets: what is read goes `into` a flow, what is due comes `out_of` one."""

    def __init__(self, into: Flow, out_of: Flow, living: "set[End]") -> None:
        self.into, self.out_of = into, out_of
        self.writable = False
        self.lost = asyncio.Event()
        self._living = living
        self._landing = memoryview(bytearray(READ_BYTES))
        self._read_all = self._wrote_all = False

    def take(self, item: bytes | None) -> None:
        """Send what has arrived."""
        if item is None:
            self.reset()
        elif self._transport.is_closing():
            pass
        elif item:
            self._transport.write(item)
        else:
            self._wrote_all = True
            self._transport.write_eof()
            if self._read_all:
                self._transport.close()

    def read_on(self, wanted: bool) -> None:
        """Read, or let the kernel make the sender wait."""
        if self._read_all or self._transport.is_closing():
            return
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def reset(self) -> None:
        """Drop the connection in a way that its peer sees as an error."""
        with contextlib.suppress(OSError):
            linger_not(self._transport.get_extra_info("socket"))
        self._transport.abort()

    # From here on: what asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        self._transport = cast("asyncio.Transport", transport)
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            raw.setsockopt(socket.SOL_SOCKET, option, KERNEL_BYTES)
        self._living.add(self)
        self.into.source = self.out_of.target = self
        self.writable = True
        self.out_of.deliver()
        self.into.regulate()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._landing

    def buffer_updated(self, n_bytes: int) -> None:
        """Bytes have arrived."""
        self.into.push(bytes(self._landing[:n_bytes]))

    def eof_received(self) -> bool:
        """The peer will say no more, but may still listen: whether it does."""
        self._read_all = True
        self.into.push(b"")
        return not self._wrote_all

    def connection_lost(self, error: Exception | None) -> None:
        """The socket is closed; after an error the far end hears of it."""
        self.lost.set()
        self._living.discard(self)
        self.out_of.close()
        if error is not None:
            self.into.push(None)

    def pause_writing(self) -> None:
        """The peer is slow to read."""
        self.writable = False

    def resume_writing(self) -> None:
        """It has caught up."""
        self.writable = True
        self.out_of.deliver()


def linger_not(raw: socket.socket) -> None:
    """Closing the socket shall send a reset."""
    layout = "hh" if sys.platform == "win32" else "ii"
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(layout, 1, 0))


def reset(raw: socket.socket) -> None:
    """Close a socket that has no transport yet, with a reset."""
    with contextlib.suppress(OSError):
        linger_not(raw)
    raw.close()
