"""A TCP connection that carries messages.

Owns the socket, the frame reader and the conversation's state, so that whoever uses it can neither
read nor say anything out of order. Knows nothing of tensors or models.

It is an asyncio protocol rather than a pair of streams because every task that a message passes
through costs tens of microseconds, on each side and for every token.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import cast

from cake.errors import ProtocolError
from cake.net.socket_options import set_options
from cake.protocol.frames import HANDSHAKE_LIMITS, MAX_HEADER, Frame, FrameReader, Limits, encode
from cake.protocol.messages import Alive, Buffer, Goodbye, Memory, Message
from cake.protocol.states import Conversation, Role

GREETING_BYTES = 4096  # read at once until the handshake is done: a stranger shall cost little
READ_BYTES = 256 * 1024
JOIN_BYTES = 64 * 1024
MAX_WAITING = 8  # messages that arrived and were not received yet; each may hold a batch
GOODBYE_S = 1.0
MAX_REASON = 500
ALIVE_EVERY_S = 1.0
DEAD_AFTER_S = 10.0


def no_memory() -> Memory:
    """Of who does not compute."""
    return Memory(0, 0)


class ConnectionLostError(ConnectionError):
    """The peer is gone; the message says how it went."""


class Connection(asyncio.BufferedProtocol):
    """One end of a connection. One task at a time may receive; any may send."""

    def __init__(self, role: Role, on_open: "Callable[[Connection], None] | None" = None) -> None:
        self._role: Role = role
        self._peer: Role = "worker" if role == "master" else "master"
        self._on_open = on_open
        self._on_frame: Callable[[Frame], None] | None = None
        self._offer: Callable[[Frame], bool] | None = None
        self._on_end: Callable[[Exception], None] | None = None
        self._conversation = Conversation()
        self._frames = FrameReader(HANDSHAKE_LIMITS)
        self._landing = memoryview(bytearray(GREETING_BYTES))
        self._inbox: deque[Frame] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None  # while the peer is slow to read
        self._hung_up = asyncio.Event()
        self._error: ConnectionLostError | ProtocolError | None = None
        self._heard = self._beat_at = 0.0
        self._reading = True
        self.bytes_sent = 0
        self.bytes_received = 0
        self.peer_address, self.peer_host = "the peer", ""
        self.peer_memory = no_memory()  # as it said last

    def raise_limits(self, payload: int) -> None:
        """After the handshake: allow tensors of at most `payload` bytes.

        As much may wait to be sent before `send` does: who computes shall not wait for a slow link.
        """
        self._landing = memoryview(bytearray(READ_BYTES))
        self._frames.limits = Limits(MAX_HEADER, payload)
        self._transport.set_write_buffer_limits(payload)

    def keep_alive(self, dead_after: float = DEAD_AFTER_S, memory: Callable[[], Memory] = no_memory) -> None:
        """After the handshake: speak every second, and give up a peer silent for `dead_after` seconds.

        A frozen process or a pulled cable sends no reset; a peer that computes goes on speaking, and
        hears of this side's `memory`.
        """
        self._heard = self._beat_at = time.perf_counter()
        self._beat(dead_after, memory)

    def _beat(self, dead_after: float, memory: Callable[[], Memory]) -> None:
        if self.over or self._transport.is_closing():
            return
        now = time.perf_counter()
        if not self._reading or now - self._beat_at > ALIVE_EVERY_S:  # it was this side that did not listen
            self._heard = now
        if now - self._heard > dead_after:
            self._end(ConnectionLostError(f"the {self._peer} has been silent for {dead_after:g} s"))
            self.abort()
            return
        alive = Alive(*memory())
        self._conversation.said(self._role, alive)
        self._write(alive)
        self._beat_at = now + ALIVE_EVERY_S
        asyncio.get_running_loop().call_later(ALIVE_EVERY_S, self._beat, dead_after, memory)

    @property
    def over(self) -> bool:
        """Whether nothing can be said any more: goodbye was said, or the peer is gone."""
        return self._conversation.state == "over" or self._error is not None

    async def send(self, message: Message) -> int:
        """Send; returns the bytes that it took. Waits while the peer is slow to read."""
        self._conversation.said(self._role, message)
        if self._transport.is_closing():
            raise self._lost()
        n_bytes = self._write(message)
        if self._writable is not None:
            await asyncio.shield(self._writable)
            if self._transport.is_closing():
                raise self._lost()
        return n_bytes

    def post(self, message: Message) -> None:
        """Send without waiting, which is for when the connection is `free`."""
        self._conversation.said(self._role, message)
        self._write(message)

    @property
    def free(self) -> bool:
        """Whether the peer is there, and little is unsent."""
        return not (self.over or self._writable is not None or self._transport.is_closing())

    def _write(self, message: Message) -> int:
        """Send without waiting; the bytes that it took."""
        head, payload = encode(message)
        if len(payload) < JOIN_BYTES:  # one packet is worth the copy
            self.write(head + payload)
        else:
            self.write(head)
            self.write(payload)
        return len(head) + len(payload)

    def write(self, data: Buffer) -> None:
        """Send bytes."""
        self._transport.write(data)
        self.bytes_sent += len(data)

    async def receive(self) -> Frame:
        """The next message. Raises `ConnectionLostError` at the end, `ProtocolError` on nonsense."""
        while not self._inbox:
            await self._something()
        frame = self._inbox.popleft()
        if len(self._inbox) < MAX_WAITING:
            self._transport.resume_reading()
            self._reading = True
        return frame

    async def _something(self) -> None:
        """Wait until bytes have arrived, or raise what the connection has ended with."""
        if self._error is not None:
            raise self._error
        self._arrival = asyncio.get_running_loop().create_future()
        await self._arrival

    def hand_over(self, on_frame: Callable[[Frame], None], on_end: Callable[[Exception], None]) -> None:
        """From now on call these instead of waiting for `receive`.

        `on_end` is called once, with what `receive` would have raised.
        """
        self._on_frame, self._on_end = on_frame, on_end
        while self._inbox:
            on_frame(self._inbox.popleft())
        if self._error is not None:
            on_end(self._error)

    def offer_first(self, take: Callable[[Frame], bool]) -> None:
        """From now on `take` may have a message as it arrives, when none waits: then it says True."""
        self._offer = take

    async def close(self, reason: str | None = None) -> None:
        """Say goodbye where a reason is given and the peer still listens; then close."""
        if reason is not None:
            with contextlib.suppress(OSError, ProtocolError, asyncio.TimeoutError):
                await asyncio.wait_for(self._take_leave(reason), GOODBYE_S)
        self._transport.close()

    async def _take_leave(self, reason: str) -> None:
        """Say goodbye, and read on until the peer has hung up too.

        A socket that is closed with bytes unread sends a reset, which would overtake the goodbye.
        """
        await self.send(Goodbye(reason[:MAX_REASON]))
        self._end(ConnectionLostError("this side has closed the connection"))  # what comes now is dropped
        self._transport.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        await self._hung_up.wait()

    def abort(self) -> None:
        """Drop the connection at once, with what is unsent."""
        self._transport.abort()

    def _lost(self) -> ConnectionLostError:
        if isinstance(self._error, ConnectionLostError):
            return self._error
        return ConnectionLostError(f"the {self._peer} is gone")

    def _end(self, error: ConnectionLostError | ProtocolError) -> None:
        if self._error is not None:
            return
        self._error = error
        if self._on_end is not None:
            self._on_end(error)
        self._wake()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    # From here on: what asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        self._transport = cast("asyncio.Transport", transport)
        set_options(transport.get_extra_info("socket"))
        peer = transport.get_extra_info("peername")
        if peer:
            self.peer_host = peer[0]
            host = f"[{peer[0]}]" if ":" in peer[0] else peer[0]
            self.peer_address = f"{host}:{peer[1]}"
        if self._on_open is not None:
            self._on_open(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._landing

    def buffer_updated(self, n_bytes: int) -> None:
        """Bytes have arrived."""
        self.bytes_received += n_bytes
        self._heard = time.perf_counter()
        if self._error is not None:
            return
        try:
            self._take(self._landing[:n_bytes])
        except ProtocolError as error:
            self._transport.pause_reading()
            self._end(error)
        if len(self._inbox) >= MAX_WAITING:
            self._transport.pause_reading()  # TCP makes the peer wait
            self._reading = False
        self._wake()

    def _take(self, data: memoryview) -> None:
        """Bytes of frames."""
        for frame in self._frames.feed(data, self._heard):
            self._conversation.said(self._peer, frame.message)
            if isinstance(frame.message, Alive):
                self.peer_memory = Memory(frame.message.memory_used, frame.message.memory_total)
                continue
            if self._on_frame is not None:
                self._on_frame(frame)
            elif self._inbox or self._offer is None or not self._offer(frame):
                self._inbox.append(frame)

    def eof_received(self) -> bool:
        """The peer will say no more, but may still listen: it shall hear why we close."""
        if self._frames.mid_frame:
            self._end(ProtocolError("the connection ended in the middle of a frame"))
        else:
            self._end(ConnectionLostError(f"the {self._peer} closed the connection"))
        self._hung_up.set()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """The socket is closed."""
        self._end(ConnectionLostError(f"the {self._peer} is gone ({error or 'closed'})"))
        self._landing = memoryview(b"")  # not when the collector comes to it
        self._hung_up.set()
        self.resume_writing()

    def pause_writing(self) -> None:
        """Much is unsent."""
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """There is room again."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None


async def connect(host: str, port: int, new: Callable[[Role], Connection] = Connection) -> Connection:
    """Connect as a master. Raises `OSError`."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: new("master"), host, port)
    return connection
