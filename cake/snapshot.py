"""The cluster at a moment, as JSON says it. A span is its first block and the one behind its last."""

from typing import Literal

from typing_extensions import TypedDict

State = Literal["up", "standby", "replaying", "lost"]
Condition = Literal["ready", "degraded", "unready", "leaving"]


class MemoryShown(TypedDict):
    """Bytes, where they are known."""

    memory_used: int | None
    memory_total: int | None


class NodeShown(MemoryShown):
    """A node, and what it is up to."""

    name: str
    address: str | None
    state: State
    device: str | None
    dtype: str | None
    spans: list[list[int]]
    holds: list[str]


class StageShown(TypedDict):
    """A stage on the way of a token; means of the last second."""

    node: str
    span: list[int]
    compute_ms: float | None
    network_ms: float | None
    bytes_per_s: float
    active: bool


class Standing(TypedDict):
    """How many requests and sessions there are now, and how many replays there were."""

    requests: int
    waiting: int
    sessions: int
    replays: int


class Rates(Standing):
    """The same, and what the last second brought."""

    tokens_per_s: float
    prompt_tokens_per_s: float


class Snapshot(TypedDict):
    """The cluster as it is now."""

    at: float
    model: str
    n_blocks: int
    context: int
    nodes: list[NodeShown]
    pipeline: list[StageShown]
    rates: Rates
