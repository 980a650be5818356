"""What master and worker say to one another.

The annotations are what is checked of a message that comes from outside (`codec`). A message does not
know how it is written in bytes, nor when it may be said (`states`).
"""

import math
from typing import Annotated, NamedTuple, TypeAlias, get_args

from msgspec import Meta, Struct

from cake.errors import ProtocolError
from cake.protocol.int8_layout import Int8Layout

VERSION = 4
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
WIRE_DTYPES = (*ITEM_SIZES, "int8")

Buffer: TypeAlias = bytes | bytearray | memoryview
Whole: TypeAlias = Annotated[int, Meta(ge=0)]


class WireTensor:
    """A tensor as it crosses the wire: row-major, little-endian. Its bytes lie outside the header."""

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, dtype: str, shape: tuple[int, ...], data: Buffer) -> None:
        """Raises `ProtocolError` where the bytes are not as many as dtype and shape say."""
        if dtype not in WIRE_DTYPES:
            raise ProtocolError(f"tensor dtype {shortened(dtype)} is unknown")
        expected = ITEM_SIZES[dtype] * math.prod(shape) if dtype != "int8" else Int8Layout.of(shape).n_bytes
        if expected != len(data):
            raise ProtocolError(
                f"a {dtype} tensor of {shortened(list(shape))} takes {shortened(expected)} bytes, "
                f"not {len(data)}"
            )
        self.dtype, self.shape, self.data = dtype, shape, data

    def __repr__(self) -> str:
        return f"WireTensor({self.dtype!r}, {self.shape}, {len(self.data)} bytes)"

    def __eq__(self, other: object) -> bool:
        """Whether it is the same tensor."""
        if not isinstance(other, WireTensor):
            return NotImplemented
        return (self.dtype, self.shape, self.data) == (other.dtype, other.shape, other.data)


class WireSegment(NamedTuple):
    """`length` consecutive tokens of a session, from `position` on.

    Where `source` is another session, this one becomes a copy of its first `position` tokens first.
    """

    session: Whole
    position: Whole
    length: Whole
    source: Whole


class Hop(NamedTuple):
    """Where a forward goes next: over a link of the worker that has it, to the span at block `first`."""

    link: Whole
    first: Whole


class StageReport(NamedTuple):
    """What a stage says of a forward: seconds it waited and computed, when on its clock, bytes it took."""

    wait_s: float
    compute_s: float
    started_s: float
    n_bytes: Whole


class Memory(NamedTuple):
    """Bytes that are used, and that there are, where somebody computes; 0 where nobody does."""

    used: int
    total: int


class SpanInfo(NamedTuple):
    """A span that a worker serves: blocks `first` to `last`, both included."""

    first: Whole
    last: Whole
    fingerprint: str


class Message(Struct, frozen=True, tag_field="kind", tag=str.lower, forbid_unknown_fields=True):
    """One of the messages below; its `kind` on the wire is its class's name in small letters."""

    @property
    def kind(self) -> str:
        """Its name on the wire."""
        return type(self).__name__.lower()


class Hello(Message, frozen=True, forbid_unknown_fields=False):
    """First of all: who I am, and which node I expect you to be.

    A master's `visit` is empty. A worker's is the one in the welcome that a master got from the same
    node: it hands on what belongs to that conversation.
    """

    version: Whole
    software: str
    node: str
    visit: str


class Welcome(Message, frozen=True, forbid_unknown_fields=False):
    """Worker to master: what I serve.

    `model` is the config's fingerprint, `weights` how they are kept (for people to read);
    `context` and `max_batch_tokens` are counts of tokens. `visit` names this conversation, and is a
    secret of those who take part; `clock` is the worker's, in seconds from some moment of its own.
    """

    version: Whole
    software: str
    node: str
    model: str
    spans: tuple[SpanInfo, ...]
    device: str
    dtype: str
    weights: str
    context: Whole
    max_batch_tokens: Whole
    visit: str
    clock: float


class Link(Message, frozen=True):
    """Master to worker: connect to that node, where my conversation is called `visit`.

    The link is called `id` from then on.
    """

    id: Whole
    node: str
    host: str
    port: Whole
    visit: str


class Linked(Message, frozen=True):
    """Worker to master: that link stands (`failed` is the other answer)."""

    id: Whole


class Unlinked(Message, frozen=True):
    """Worker to master: that link is no more, and with it whatever was on its way there."""

    id: Whole
    reason: str


class Leaving(Message, frozen=True):
    """Worker to master: I shall stop soon, and answer until then. Begin nothing here that others can do."""


class Alive(Message, frozen=True):
    """Either side, every second: I am here, whatever I compute.

    A worker says how many bytes of memory it uses where it computes, and how many there are; others say 0.
    """

    memory_used: Whole
    memory_total: Whole


class Forward(Message, frozen=True):
    """To a worker: run these hidden states through the span that begins at block `first`.

    What comes out goes along the `route`; after its end, to the master. `stages` are the reports of
    those that it passed.
    """

    id: Whole
    first: Whole
    segments: tuple[WireSegment, ...]
    route: tuple[Hop, ...]
    stages: tuple[StageReport, ...]
    hidden: WireTensor


class Result(Message, frozen=True):
    """Worker to master: the hidden states that came out, and every stage's report."""

    id: Whole
    stages: tuple[StageReport, ...]
    hidden: WireTensor


class Lost(Message, frozen=True):
    """Worker to master: I hold only the first `held` tokens of that session."""

    id: Whole
    session: Whole
    held: Whole


class Failed(Message, frozen=True):
    """Worker to master: that forward failed, for this reason; I go on serving."""

    id: Whole
    reason: str


class Forget(Message, frozen=True):
    """Master to worker: these sessions are over; free what you hold of them."""

    sessions: tuple[Whole, ...]


class Goodbye(Message, frozen=True):
    """Either side: I close this connection, for this reason."""

    reason: str


AnyMessage: TypeAlias = (
    Hello | Welcome | Alive | Link | Linked | Unlinked | Leaving
    | Forward | Result | Lost | Failed | Forget | Goodbye
)  # fmt: skip
MESSAGES: dict[str, type[Message]] = {message.__name__.lower(): message for message in get_args(AnyMessage)}


def shortened(value: object) -> str:
    """For a reason: what the peer sent, but not all of it."""
    return f"{value!r:.60}"
