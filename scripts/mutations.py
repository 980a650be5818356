"""Frames with something wrong in them: in their bytes, or in what they say.

Knows no sockets: whoever sends them keeps the random numbers, so that a seed gives the same again.
"""

import random
from collections.abc import Iterator
from typing import Any

from msgspec import msgpack

from cake.protocol.codec import pack
from cake.protocol.frames import MAGIC, PREFIX, encode
from cake.protocol.handshake import hello
from cake.protocol.messages import (
    VERSION,
    Alive,
    Failed,
    Forget,
    Forward,
    Goodbye,
    Hop,
    Leaving,
    Link,
    Linked,
    Lost,
    Message,
    Result,
    SpanInfo,
    StageReport,
    Unlinked,
    Welcome,
    WireSegment,
    WireTensor,
)

DEEP: list[Any] = []
for _ in range(500):
    DEEP = [DEEP]
ODD: list[Any] = [
    *(0, 1, -1, 255, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, -(2**63)),
    *(0.0, -1.0, float("nan"), float("inf"), 1e308),
    *("", "\0", "x" * 3000, "../../etc/passwd", "float64", "int8", "\u202e", "127.0.0.1"),
    *(None, True, b"", b"\xff" * 100, [], {}, DEEP, list(range(2000))),
]


def spoken(node: str, hidden_size: int) -> list[Message]:
    """A sound message of every kind, of some more than one."""
    tensor = WireTensor("float32", (1, hidden_size), bytes(4 * hidden_size))
    two = WireTensor("bfloat16", (2, hidden_size), bytes(4 * hidden_size))
    report = StageReport(0.0, 0.001, 1.0, 2400)
    span = SpanInfo(0, 1, "")
    return [
        hello(node),
        hello(node, "somebody's visit"),
        Forward(1, 0, (WireSegment(0, 0, 1, 0),), (), (), tensor),
        Forward(2, 0, (WireSegment(1, 0, 1, 1), WireSegment(2, 0, 1, 2)), (), (report,), two),
        Forward(3, 0, (WireSegment(3, 7, 1, 0),), (Hop(4, 5),), (), tensor),
        Link(3, node, "127.0.0.1", 1, "nobody"),
        Forget((0, 1)),
        Alive(0, 0),
        Goodbye("enough"),
        Result(1, (report,), tensor),
        Welcome(VERSION, "cake", node, "m", (span,), "cpu", "float32", "float32", 512, 2048, "", 0.0),
        Lost(1, 0, 0),
        Failed(1, "a reason"),
        Linked(3),
        Unlinked(3, "a reason"),
        Leaving(),
    ]


def whole(message: Message) -> bytes:
    """All bytes of its frame."""
    return b"".join(map(bytes, encode(message)))


def frames_in(data: bytes) -> Iterator[bytes]:
    """The frames that follow one another in recorded bytes, the last one perhaps cut off."""
    start = 0
    while start + PREFIX.size <= len(data):
        _, header, payload = PREFIX.unpack_from(data, start)
        end = start + PREFIX.size + header + payload
        yield data[start:end]
        start = end


def mutated(chance: random.Random, frames: list[bytes]) -> bytes:
    """One of the frames with wrong bytes, mostly near its beginning, where it is read with care."""
    data = bytearray(chance.choice(frames))
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
            data[place:] = chance.choice(frames)[place:]
        if not data:
            return b"\0"
    return bytes(data)


def bent(chance: random.Random, message: Message) -> bytes:
    """A frame of the right form that says something odd: a value, a field or the payload is not as it was."""
    header, payload = pack(message)
    fields = msgpack.decode(header)
    for _ in range(chance.choice((1, 1, 2, 4))):
        fields = _odd(chance, fields)
    data = bytes(payload)
    data = chance.choice((data, data, data[:-1], 2 * data, b"", b"x"))
    header = msgpack.encode(fields)
    return PREFIX.pack(MAGIC, len(header), len(data)) + header + data


def _odd(chance: random.Random, value: Any) -> Any:
    """The same with one thing changed, somewhere in it."""
    if isinstance(value, dict) and value:
        return _odd_map(chance, value)
    if isinstance(value, list) and value and chance.random() < 0.8:
        return _odd_list(chance, value)
    return chance.choice(ODD)


def _odd_map(chance: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    name, kind = chance.choice(list(fields)), chance.random()
    if kind < 0.1:
        return {key: value for key, value in fields.items() if key != name}
    if kind < 0.2:
        return {**fields, "more": chance.choice(ODD)}
    if name == "kind" and kind < 0.9:  # it would be refused for that alone
        return fields if len(fields) == 1 else _odd_map(chance, fields)
    return {**fields, name: _odd(chance, fields[name])}


def _odd_list(chance: random.Random, values: list[Any]) -> list[Any]:
    place, kind = chance.randrange(len(values)), chance.random()
    if kind < 0.1:
        return values[:place] + values[place + 1 :]
    if kind < 0.2:
        return values * chance.choice((2, 50))
    if kind < 0.3:
        return [*values, chance.choice(ODD)]
    return [*values[:place], _odd(chance, values[place]), *values[place + 1 :]]
