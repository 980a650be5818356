"""Frames: a length-prefixed msgpack header, then the payload's raw bytes.

    magic "CAKE" | header length, u32 | payload length, u64 | header | payload     (big-endian)

The payload stays outside msgpack so that a tensor is never copied to be packed. Every length is
checked against a limit before anything of that length is stored.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cake.errors import ProtocolError
from cake.protocol.codec import pack, unpack
from cake.protocol.messages import Buffer, Message

MAGIC = b"CAKE"
KEYED_MAGIC = b"CAKETLS1"  # what a peer with a cluster key begins with, see `cluster_key`
PREFIX = struct.Struct(">4sIQ")


@dataclass(frozen=True)
class Limits:
    """The most bytes that a frame's header and payload may have."""

    header: int
    payload: int


HANDSHAKE_LIMITS = Limits(header=4096, payload=0)
MAX_HEADER = 64 * 1024


def encode(message: Message) -> tuple[bytes, Buffer]:
    """The bytes of a message in two pieces, to be sent one after the other."""
    header, payload = pack(message)
    return PREFIX.pack(MAGIC, len(header), len(payload)) + header, payload


class Frame(NamedTuple):
    """A message that arrived, the bytes that it took on the wire, and when it came, where that is known."""

    message: Message
    n_bytes: int
    arrived_s: float = 0.0


class FrameReader:
    """Turns bytes, in whatever pieces they arrive, into messages.

    After a `ProtocolError` the reader is of no more use: the bytes that follow have no meaning.
    """

    def __init__(self, limits: Limits = HANDSHAKE_LIMITS) -> None:
        self.limits = limits
        self._buffer = bytearray()
        self._start = 0  # of the first frame that was not given out yet

    def feed(self, data: Buffer, arrived_s: float = 0.0) -> Iterator[Frame]:
        """Add bytes; yield the messages that are complete. Limits may change between messages."""
        self._buffer += data
        while (frame := self._next(arrived_s)) is not None:
            yield frame
        del self._buffer[: self._start]
        self._start = 0

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._buffer)

    def _next(self, arrived_s: float) -> Frame | None:
        if len(self._buffer) - self._start < PREFIX.size:
            if not MAGIC.startswith(self._buffer[self._start : self._start + len(MAGIC)]):
                raise _wrong_magic()
            return None
        magic, header_length, payload_length = PREFIX.unpack_from(self._buffer, self._start)
        if magic != MAGIC:
            raise _wrong_magic()
        if self._buffer.startswith(KEYED_MAGIC, self._start):
            raise ProtocolError("one side has a cluster key and the other has none; give both the same")
        self._check(header_length, payload_length)
        header_start = self._start + PREFIX.size
        header_end = header_start + header_length
        end = header_end + payload_length
        if len(self._buffer) < end:
            return None
        n_bytes = end - self._start
        header = self._buffer[header_start:header_end]
        return Frame(unpack(header, self._take(header_end, end)), n_bytes, arrived_s)

    def _check(self, header: int, payload: int) -> None:
        if header > self.limits.header:
            raise ProtocolError(f"a header of {header} bytes is over the limit {self.limits.header}")
        if payload > self.limits.payload:
            raise ProtocolError(f"a payload of {payload} bytes is over the limit {self.limits.payload}")

    def _take(self, start: int, end: int) -> Buffer:
        """The payload, in memory of its own; the frame is done."""
        if end == len(self._buffer):  # the usual case: a large payload is not copied
            taken, self._buffer, self._start = self._buffer, bytearray(), 0
            return memoryview(taken)[start:end]
        self._start = end
        return self._buffer[start:end]


def _wrong_magic() -> ProtocolError:
    return ProtocolError("these bytes are not Cake's protocol (wrong magic)")
