"""A TCP connection that carries messages.

Owns the socket, the frame reader and the conversation's state, so that whoever uses it can neither
read nor say anything out of order. Knows nothing of tensors or models.
"""

import asyncio
import contextlib
import socket
from collections import deque

from cake.errors import ProtocolError
from cake.protocol.frames import HANDSHAKE_LIMITS, MAX_HEADER, Frame, FrameReader, Limits, encode
from cake.protocol.messages import Goodbye, Message
from cake.protocol.states import Conversation, Role

READ_BYTES = 256 * 1024
GOODBYE_S = 1.0
MAX_REASON = 500


class ConnectionLostError(ConnectionError):
    """The peer is gone; the message says how it went."""


class Connection:
    """One end of a connection. One task at a time may receive; any may send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, role: Role) -> None:
        self._reader, self._writer = reader, writer
        self._role: Role = role
        self._peer: Role = "worker" if role == "master" else "master"
        self._conversation = Conversation()
        self._frames = FrameReader(HANDSHAKE_LIMITS)
        self._inbox: deque[Frame] = deque()
        self.bytes_sent = 0
        self.bytes_received = 0
        self.peer_address = _address(writer)
        raw = writer.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def raise_limits(self, payload: int) -> None:
        """After the handshake: allow tensors of at most `payload` bytes."""
        self._frames.limits = Limits(MAX_HEADER, payload)

    async def send(self, message: Message) -> int:
        """Send; returns the bytes that it took. Waits while the peer is slow to read."""
        self._conversation.said(self._role, message)
        head, payload = encode(message)
        # Apart, a small head would wait in the loop for a large payload's copy; joined, one small
        # message is one packet.
        self._writer.writelines((head, payload) if len(payload) else (head,))
        n_bytes = len(head) + len(payload)
        self.bytes_sent += n_bytes
        try:
            await self._writer.drain()
        except OSError as error:
            raise ConnectionLostError(f"{self.peer_address} is gone ({error})") from error
        return n_bytes

    async def receive(self) -> Frame:
        """The next message. Raises `ConnectionLostError` at the end, `ProtocolError` on nonsense."""
        while not self._inbox:
            try:
                data = await self._reader.read(READ_BYTES)
            except OSError as error:
                raise ConnectionLostError(f"{self.peer_address} is gone ({error})") from error
            if not data:
                if self._frames.mid_frame:
                    raise ProtocolError("the connection ended in the middle of a frame")
                raise ConnectionLostError(f"{self.peer_address} closed the connection")
            self.bytes_received += len(data)
            for frame in self._frames.feed(data):
                self._conversation.said(self._peer, frame.message)
                self._inbox.append(frame)
        return self._inbox.popleft()

    async def close(self, reason: str | None = None) -> None:
        """Say goodbye where a reason is given and the peer still listens; then close."""
        with contextlib.suppress(OSError, ProtocolError, asyncio.TimeoutError):
            if reason is not None:
                await asyncio.wait_for(self._take_leave(reason), GOODBYE_S)
        self._writer.close()
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), GOODBYE_S)

    async def _take_leave(self, reason: str) -> None:
        """Say goodbye, and read on until the peer has hung up too.

        A socket that is closed with bytes unread sends a reset, which would overtake the goodbye.
        """
        await self.send(Goodbye(reason[:MAX_REASON]))
        if self._writer.can_write_eof():
            self._writer.write_eof()
        while await self._reader.read(READ_BYTES):
            pass

    @property
    def over(self) -> bool:
        """Whether goodbye was said, by either side."""
        return self._conversation.state == "over"

    def abort(self) -> None:
        """Drop the connection at once, with what is unsent."""
        self._writer.transport.abort()


def _address(writer: asyncio.StreamWriter) -> str:
    peer = writer.get_extra_info("peername")
    if not peer:
        return "the peer"
    return f"[{peer[0]}]:{peer[1]}" if ":" in str(peer[0]) else f"{peer[0]}:{peer[1]}"
