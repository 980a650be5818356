"""What master and worker say to one another: frozen dataclasses, and the table of their kinds.

A message knows its fields and checks them when it comes from outside. It does not know how it is
framed (`frames`), nor when it may be said (`states`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeAlias

from cake.errors import ProtocolError
from cake.protocol.int8_layout import Int8Layout

VERSION = 3
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
WIRE_DTYPES = (*ITEM_SIZES, "int8")

# Another version may add fields to these: who it is must be understood before it is refused.
GREETINGS = ("hello", "welcome")

Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True)
class WireTensor:
    """A tensor as it crosses the wire: row-major, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer

    def __post_init__(self) -> None:
        if self.dtype not in WIRE_DTYPES:
            raise ProtocolError(f"tensor dtype {_short(self.dtype)} is unknown")
        if self.dtype == "int8":
            expected = Int8Layout.of(self.shape).n_bytes
        else:
            expected = math.prod(self.shape) * ITEM_SIZES[self.dtype]
        if expected != len(self.data):
            raise ProtocolError(
                f"a {self.dtype} tensor of {_short(list(self.shape))} takes {_short(expected)} bytes, "
                f"not {len(self.data)}"
            )


class WireSegment(NamedTuple):
    """`length` consecutive tokens of a session, from `position` on.

    Where `source` is another session, this one becomes a copy of its first `position` tokens first.
    """

    session: int
    position: int
    length: int
    source: int


class Hop(NamedTuple):
    """Where a forward goes next: over a link of the worker that has it, to the span at block `first`."""

    link: int
    first: int


class StageReport(NamedTuple):
    """What a stage says of a forward: seconds it waited and computed, when on its clock, bytes it took."""

    wait_s: float
    compute_s: float
    started_s: float
    n_bytes: int


class SpanInfo(NamedTuple):
    """A span that a worker serves: blocks `first` to `last`, both included."""

    first: int
    last: int
    fingerprint: str


class Message:
    """One of the messages below; `kind` is its name on the wire."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Hello(Message):
    """First of all: who I am, and which node I expect you to be.

    A master's `visit` is empty. A worker's is the one in the welcome that a master got from the same
    node: it hands on what belongs to that conversation.
    """

    kind: ClassVar[str] = "hello"
    version: int
    software: str
    node: str
    visit: str


@dataclass(frozen=True)
class Welcome(Message):
    """Worker to master: what I serve.

    `model` is the config's fingerprint, `weights` how they are kept (for people to read);
    `context` and `max_batch_tokens` are counts of tokens. `visit` names this conversation, and is a
    secret of those who take part; `clock` is the worker's, in seconds from some moment of its own.
    """

    kind: ClassVar[str] = "welcome"
    version: int
    software: str
    node: str
    model: str
    spans: tuple[SpanInfo, ...]
    device: str
    dtype: str
    weights: str
    context: int
    max_batch_tokens: int
    visit: str
    clock: float


@dataclass(frozen=True)
class Link(Message):
    """Master to worker: connect to that node, where my conversation is called `visit`.

    The link is called `id` from then on.
    """

    kind: ClassVar[str] = "link"
    id: int
    node: str
    host: str
    port: int
    visit: str


@dataclass(frozen=True)
class Linked(Message):
    """Worker to master: that link stands (`failed` is the other answer)."""

    kind: ClassVar[str] = "linked"
    id: int


@dataclass(frozen=True)
class Unlinked(Message):
    """Worker to master: that link is no more, and with it whatever was on its way there."""

    kind: ClassVar[str] = "unlinked"
    id: int
    reason: str


@dataclass(frozen=True)
class Leaving(Message):
    """Worker to master: I shall stop soon, and answer until then. Begin nothing here that others can do."""

    kind: ClassVar[str] = "leaving"


@dataclass(frozen=True)
class Alive(Message):
    """Either side, every second: I am here, whatever I compute."""

    kind: ClassVar[str] = "alive"


@dataclass(frozen=True)
class Forward(Message):
    """To a worker: run these hidden states through the span that begins at block `first`.

    What comes out goes along the `route`; after its end, to the master. `stages` are the reports of
    those that it passed.
    """

    kind: ClassVar[str] = "forward"
    id: int
    first: int
    segments: tuple[WireSegment, ...]
    route: tuple[Hop, ...]
    stages: tuple[StageReport, ...]
    hidden: WireTensor


@dataclass(frozen=True)
class Result(Message):
    """Worker to master: the hidden states that came out, and every stage's report."""

    kind: ClassVar[str] = "result"
    id: int
    stages: tuple[StageReport, ...]
    hidden: WireTensor


@dataclass(frozen=True)
class Lost(Message):
    """Worker to master: I hold only the first `held` tokens of that session."""

    kind: ClassVar[str] = "lost"
    id: int
    session: int
    held: int


@dataclass(frozen=True)
class Failed(Message):
    """Worker to master: that forward failed, for this reason; I go on serving."""

    kind: ClassVar[str] = "failed"
    id: int
    reason: str


@dataclass(frozen=True)
class Forget(Message):
    """Master to worker: these sessions are over; free what you hold of them."""

    kind: ClassVar[str] = "forget"
    sessions: tuple[int, ...]


@dataclass(frozen=True)
class Goodbye(Message):
    """Either side: I close this connection, for this reason."""

    kind: ClassVar[str] = "goodbye"
    reason: str


_EVERY: tuple[type[Message], ...] = (
    *(Hello, Welcome, Alive, Link, Linked, Unlinked, Leaving),
    *(Forward, Result, Lost, Failed, Forget, Goodbye),
)
MESSAGES = {message.kind: message for message in _EVERY}


def to_header(message: Message) -> tuple[dict[str, Any], Buffer]:
    """The header map of a message, and the payload that follows it (empty without a tensor)."""
    header: dict[str, Any] = {"kind": message.kind}
    payload: Buffer = b""
    for name in _READERS[message.kind]:
        value = getattr(message, name)
        if type(value) is WireTensor:
            payload = value.data
            value = {"dtype": value.dtype, "shape": value.shape}
        header[name] = value
    return header, payload


def from_header(header: object, payload: Buffer) -> Message:
    """The message that a header and its payload spell; `ProtocolError` when they spell none."""
    if not isinstance(header, dict):
        raise ProtocolError("a frame's header must be a map")
    kind = header.get("kind")
    if not isinstance(kind, str) or kind not in MESSAGES:
        raise ProtocolError(f"a message of unknown kind {_short(kind)}")
    readers = _READERS[kind]
    if header.keys() != _NAMES[kind] and not (kind in GREETINGS and header.keys() > _NAMES[kind]):
        if kind in GREETINGS and header.get("version", VERSION) != VERSION:
            raise ProtocolError(
                f"the {kind} is of protocol version {_short(header.get('version'))}, this side speaks "
                f"{VERSION}; run the same Cake on both"
            )
        raise ProtocolError(f"a {kind} message has the fields {', '.join(readers)}")
    if payload and "hidden" not in readers:
        raise ProtocolError(f"a {kind} message has no payload")
    try:
        values = {name: read(header[name], payload) for name, read in readers.items()}
    except (TypeError, ValueError, KeyError) as error:
        raise ProtocolError(f"a {kind} message has a malformed field: {error}") from error
    return MESSAGES[kind](**values)


def _short(value: object) -> str:
    """For a reason: what the peer sent, but not all of it."""
    return f"{value!r:.60}"


def _whole(value: object, _: Buffer = b"") -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{_short(value)} is not a whole number")
    return value


def _text(value: object, _: Buffer = b"") -> str:
    if not isinstance(value, str):
        raise TypeError(f"{_short(value)} is not text")
    return value


def _number(value: object, _: Buffer = b"") -> float:
    if not isinstance(value, float):
        raise TypeError(f"{_short(value)} is not a floating-point number")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{_short(value)} is not a list")
    return value


def _wholes(value: object, _: Buffer = b"") -> tuple[int, ...]:
    return tuple([_whole(item) for item in _list(value)])


def _segments(value: object, _: Buffer = b"") -> tuple[WireSegment, ...]:
    return tuple([WireSegment(*_wholes(item)) for item in _list(value)])


def _route(value: object, _: Buffer = b"") -> tuple[Hop, ...]:
    return tuple([Hop(*_wholes(item)) for item in _list(value)])


def _report(value: object) -> StageReport:
    wait_s, compute_s, started_s, n_bytes = _list(value)
    return StageReport(_number(wait_s), _number(compute_s), _number(started_s), _whole(n_bytes))


def _reports(value: object, _: Buffer = b"") -> tuple[StageReport, ...]:
    return tuple([_report(item) for item in _list(value)])


def _spans(value: object, _: Buffer = b"") -> tuple[SpanInfo, ...]:
    triples = [(first, last, mark) for first, last, mark in map(_list, _list(value))]
    return tuple(SpanInfo(_whole(first), _whole(last), _text(mark)) for first, last, mark in triples)


def _tensor(value: object, payload: Buffer) -> WireTensor:
    if not isinstance(value, Mapping):
        raise TypeError(f"{_short(value)} does not describe a tensor")
    return WireTensor(_text(value["dtype"]), _wholes(value["shape"]), payload)


_Reader: TypeAlias = Callable[[object, Buffer], Any]
_READER_OF_TYPE: dict[Any, _Reader] = {
    int: _whole,
    str: _text,
    float: _number,
    tuple[int, ...]: _wholes,
    tuple[WireSegment, ...]: _segments,
    tuple[Hop, ...]: _route,
    tuple[StageReport, ...]: _reports,
    tuple[SpanInfo, ...]: _spans,
    WireTensor: _tensor,
}
_READERS: dict[str, dict[str, _Reader]] = {
    kind: {field.name: _READER_OF_TYPE[field.type] for field in fields(message)}  # type: ignore
    for kind, message in MESSAGES.items()
}
_NAMES = {kind: {"kind", *readers} for kind, readers in _READERS.items()}
