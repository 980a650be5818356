"""Messages: their kinds, and tensors that are as long as they say."""

import pytest

from cake.errors import ProtocolError
from cake.protocol.int8_layout import Int8Layout
from cake.protocol.messages import (
    MESSAGES,
    Alive,
    Failed,
    Forget,
    Forward,
    Goodbye,
    Hello,
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

REPORTS = (StageReport(0.5, 0.25, 1e6, 77), StageReport(0.0, 0.125, -1.5, 2**40))
TENSOR = WireTensor("bfloat16", (3, 2), b"abcdefghijkl")
WELCOME = Welcome(
    version=1,
    software="cake/0.1.0",
    node="attic",
    model="0123456789abcdef",
    spans=(SpanInfo(0, 5, "aa"), SpanInfo(17, 17, "bb")),
    device="cuda:0",
    dtype="bfloat16",
    context=8192,
    weights="int8",
    max_batch_tokens=2048,
    visit="5ec7e7",
    clock=12.5,
)
EXAMPLES: list[Message] = [
    Hello(1, "cake/0.1.0", "büro", ""),
    WELCOME,
    Link(3, "attic", "192.168.1.20", 10128, "5ec7e7"),
    Linked(3),
    Unlinked(3, "the worker is gone"),
    Leaving(),
    Alive(123_456_789, 2**35),
    Forward(
        2**64 - 1,
        6,
        (WireSegment(0, 0, 2, 0), WireSegment(9, 511, 1, 4)),
        (Hop(3, 0), Hop(4, 2**40)),
        REPORTS,
        TENSOR,
    ),
    Result(7, REPORTS, TENSOR),
    Lost(7, 3, 12),
    Failed(7, "out of memory"),
    Forget((1, 2, 3)),
    Goodbye("the master is done"),
]


def test_there_is_an_example_of_every_kind() -> None:
    assert {type(example) for example in EXAMPLES} == set(MESSAGES.values())
    assert set(MESSAGES) == {
        "hello",
        "welcome",
        "link",
        "linked",
        "unlinked",
        "leaving",
        "alive",
        "forward",
        "result",
        "lost",
        "failed",
        "forget",
        "goodbye",
    }


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_the_size_of_each_dtype(dtype: str, size: int) -> None:
    assert WireTensor(dtype, (3, 5), bytes(15 * size)).shape == (3, 5)
    with pytest.raises(ProtocolError, match=f"takes {15 * size} bytes"):
        WireTensor(dtype, (3, 5), bytes(15 * size - 1))


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((3, 64), 3 * (2 + 8 * 4 + 64)),
        ((3, 65), 3 * (2 * 2 + 8 * 4 + 65)),
        ((1, 20), 2 + 2 * 4 + 20),
        ((2, 7), 2 * (2 + 7)),
        ((0, 64), 0),
        ((5, 0), 0),
        ((), 3),
    ],
)
def test_the_size_of_int8(shape: tuple[int, ...], size: int) -> None:
    assert WireTensor("int8", shape, bytes(size)).shape == shape
    with pytest.raises(ProtocolError, match=f"takes {size} bytes, not {size + 1}"):
        WireTensor("int8", shape, bytes(size + 1))


def test_rows_too_long_for_int8() -> None:
    with pytest.raises(ProtocolError, match="rows of 65537 channels are too long for int8"):
        WireTensor("int8", (1, 2**16 + 1), b"")


def test_int8_is_never_longer_than_float32() -> None:
    """By which the payload's limit goes."""
    sizes = [Int8Layout.of((1, width)).n_bytes for width in range(1, 1000)]
    assert all(size <= 4 * width for width, size in enumerate(sizes, 1))
