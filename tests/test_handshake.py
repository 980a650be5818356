"""The handshake's decisions: what is refused, and in which words."""

from dataclasses import replace

import pytest
from msgspec import structs

from cake.errors import NodeError, ProtocolError
from cake.protocol.handshake import (
    MAX_BATCH_TOKENS,
    Expectation,
    check_hello,
    check_welcome,
    describe_spans,
    hello,
    payload_limit,
    span_infos,
)
from cake.protocol.messages import VERSION, Hello, SpanInfo, Welcome

EXPECTED = Expectation("attic", "m1", 64, (range(0, 6), range(17, 18)), ("aa", None))
WELCOME = Welcome(
    version=VERSION,
    software="cake/9.9",
    node="attic",
    model="m1",
    spans=(SpanInfo(0, 5, "aa"), SpanInfo(17, 17, "bb")),
    device="cpu",
    dtype="float32",
    context=512,
    weights="int8",
    max_batch_tokens=2048,
    visit="5ec7e7",
    clock=0.0,
)
ADDRESS = "192.168.1.20:10128"


def test_a_worker_accepts_its_name() -> None:
    check_hello(hello("attic"), "attic")
    with pytest.raises(ProtocolError, match="this worker is 'attic', not 'porch'"):
        check_hello(hello("porch"), "attic")


@pytest.mark.parametrize("version", [0, VERSION + 1, 2**64 - 1])
def test_a_worker_refuses_another_version(version: int) -> None:
    refusal = rf"speaks protocol version {VERSION}, the master \(cake/9.9\) version {version}"
    with pytest.raises(ProtocolError, match=refusal):
        check_hello(Hello(version, "cake/9.9", "attic", ""), "attic")


def test_the_version_is_judged_before_the_name() -> None:
    with pytest.raises(ProtocolError, match="version"):
        check_hello(Hello(VERSION + 1, "cake/9.9", "porch", ""), "attic")


@pytest.mark.parametrize("fingerprints", [("aa", "bb"), ("aa", None), (None, "bb"), (None, None)], ids=str)
def test_a_master_accepts_what_it_knows_and_what_it_cannot_know(fingerprints: tuple[str | None, ...]) -> None:
    check_welcome(WELCOME, replace(EXPECTED, fingerprints=fingerprints), ADDRESS)


REFUSED = {
    "version": (
        structs.replace(WELCOME, version=VERSION + 1),
        f"speaks protocol version {VERSION + 1}, this master {VERSION}",
    ),
    "model": (structs.replace(WELCOME, model="m2"), "serves another model .*is m2, here m1"),
    "more spans": (
        structs.replace(WELCOME, spans=(*WELCOME.spans, SpanInfo(20, 21, "cc"))),
        "serves blocks 0-5, 17, 20-21, but this topology says 0-5, 17",
    ),
    "fewer spans": (structs.replace(WELCOME, spans=WELCOME.spans[:1]), "serves blocks 0-5, but"),
    "no spans": (structs.replace(WELCOME, spans=()), "serves blocks none, but"),
    "other span": (
        structs.replace(WELCOME, spans=(SpanInfo(0, 4, "aa"), SpanInfo(17, 17, "bb"))),
        "serves blocks 0-4, 17, but",
    ),
    "weights": (
        structs.replace(WELCOME, spans=(SpanInfo(0, 5, "ab"), SpanInfo(17, 17, "bb"))),
        "the weights of its blocks 0-5 differ",
    ),
}


@pytest.mark.parametrize(("welcome", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_master_refuses(welcome: Welcome, reason: str) -> None:
    with pytest.raises(NodeError, match=rf"^worker 'attic' at 192.168.1.20:10128 .*{reason}"):
        check_welcome(welcome, EXPECTED, ADDRESS)


@pytest.mark.parametrize(("first", "last"), [(5, 2), (1, 0), (0, 2**64 - 1), (2**64 - 1, 0)])
def test_a_master_refuses_a_span_that_is_none(first: int, last: int) -> None:
    """What comes over the wire is any two numbers."""
    with pytest.raises(NodeError, match="but this topology says 0-5, 17"):
        check_welcome(structs.replace(WELCOME, spans=(SpanInfo(first, last, ""),)), EXPECTED, ADDRESS)


def test_a_master_refuses_a_worker_that_takes_no_tokens() -> None:
    """It would otherwise cut prompts into chunks of nothing."""
    with pytest.raises(NodeError, match="worker 'attic'"):
        check_welcome(structs.replace(WELCOME, max_batch_tokens=0), EXPECTED, ADDRESS)


@pytest.mark.parametrize(
    ("spans", "text"),
    [
        ([], "none"),
        ([range(3, 4)], "3"),
        ([range(0, 2)], "0-1"),
        ([range(0, 6), range(17, 18), range(20, 32)], "0-5, 17, 20-31"),
    ],
)
def test_describe_spans(spans: list[range], text: str) -> None:
    assert describe_spans(spans) == text


def test_span_infos() -> None:
    infos = span_infos([range(0, 6), range(17, 18)], ["aa", "bb"])
    assert infos == (SpanInfo(0, 5, "aa"), SpanInfo(17, 17, "bb"))


def test_payload_limit() -> None:
    assert payload_limit(10, 64) == 10 * 64 * 4
    assert payload_limit(2**64 - 1, 64) == MAX_BATCH_TOKENS * 64 * 4
