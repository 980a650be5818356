"""The handshake's decisions: may these two work together?

The master says `Hello`, the worker answers `Welcome` or `Goodbye`. The worker judges the version and
the name it was called by; the master judges what the worker serves. No bytes move here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cake import __version__
from cake.errors import NodeError, ProtocolError
from cake.protocol.messages import VERSION, Hello, SpanInfo, Welcome

SOFTWARE = f"cake/{__version__}"
MAX_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Expectation:
    """What the master's topology and checkpoint promise of a worker.

    `fingerprints` has an entry per span, none where the master does not have those weights.
    """

    node: str
    model: str
    hidden_size: int
    spans: tuple[range, ...]
    fingerprints: tuple[str | None, ...]
    context: int = 0  # tokens of a session that it must have room for


def hello(node: str, visit: str = "") -> Hello:
    """The first words to the worker that should be `node`; `visit` as `Hello` says."""
    return Hello(VERSION, SOFTWARE, node, visit)


def check_hello(message: Hello, node: str) -> None:
    """The worker's judgement; `ProtocolError` with the reason to refuse."""
    if message.version != VERSION:
        raise ProtocolError(
            f"this worker ({SOFTWARE}) speaks protocol version {VERSION}, the master "
            f"({message.software}) version {message.version}; run the same Cake on both"
        )
    if message.node != node:
        raise ProtocolError(f"this worker is {node!r}, not {message.node!r}; check the host in the topology")


def check_welcome(message: Welcome, expected: Expectation, address: str) -> None:
    """The master's judgement; `NodeError` with the reason why this worker will not do."""
    who = f"worker {expected.node!r} at {address}"
    if message.version != VERSION:
        raise NodeError(
            f"{who} speaks protocol version {message.version}, this master {VERSION}; "
            "run the same Cake on both"
        )
    if message.model != expected.model:
        raise NodeError(
            f"{who} serves another model (its config's fingerprint is {message.model}, "
            f"here {expected.model}); give both the same --model"
        )
    served = [(span.first, span.last) for span in message.spans]
    promised = [(span[0], span[-1]) for span in expected.spans]
    if served != promised:
        raise NodeError(
            f"{who} serves blocks {_describe(served)}, but this topology says {_describe(promised)}; "
            "give both the same topology"
        )
    if message.context < expected.context:
        raise NodeError(
            f"{who} holds sessions of at most {message.context} tokens, and those here may have "
            f"{expected.context}; start it with --context {expected.context}"
        )
    if not message.max_batch_tokens:
        raise NodeError(f"{who} takes no tokens at all (its max_batch_tokens is 0)")
    for span, fingerprint in zip(message.spans, expected.fingerprints, strict=True):
        if fingerprint is not None and span.fingerprint != fingerprint:
            raise NodeError(
                f"{who} serves another model: the weights of its blocks "
                f"{span.first}-{span.last} differ from those here; give both the same --model"
            )


def payload_limit(batch_tokens: int, hidden_size: int) -> int:
    """Bytes of the largest batch: no dtype on the wire is wider than 4 bytes."""
    return min(batch_tokens, MAX_BATCH_TOKENS) * hidden_size * 4


def describe_spans(spans: Sequence[range]) -> str:
    """Spans as a person writes them: `0-5, 17`."""
    return _describe([(span[0], span[-1]) for span in spans])


def _describe(spans: Sequence[tuple[int, int]]) -> str:
    texts = [f"{first}-{last}" if first != last else str(first) for first, last in spans]
    return ", ".join(texts)[:200] or "none"


def span_infos(spans: Sequence[range], fingerprints: Sequence[str]) -> tuple[SpanInfo, ...]:
    """The worker's side of an `Expectation`."""
    pairs = zip(spans, fingerprints, strict=True)
    return tuple(SpanInfo(span[0], span[-1], mark) for span, mark in pairs)
