"""Messages: every kind goes there and back, and nothing malformed becomes one."""

from dataclasses import replace

import pytest

from cake.errors import ProtocolError
from cake.protocol.int8_layout import Int8Layout
from cake.protocol.messages import (
    MESSAGES,
    VERSION,
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
    from_header,
    to_header,
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
    Alive(),
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
HEADERS = {
    "hello": {"kind": "hello", "version": VERSION, "software": "s", "node": "attic", "visit": ""},
    "lost": {"kind": "lost", "id": 1, "session": 2, "held": 3},
    "failed": {"kind": "failed", "id": 1, "reason": "r"},
    "forget": {"kind": "forget", "sessions": [1, 2]},
    "welcome": {
        "kind": "welcome",
        "version": VERSION,
        "software": "s",
        "node": "attic",
        "model": "m",
        "spans": [[0, 5, "aa"]],
        "device": "cpu",
        "dtype": "float32",
        "weights": "int8",
        "context": 512,
        "max_batch_tokens": 64,
        "visit": "v",
        "clock": 0.5,
    },
    "link": {"kind": "link", "id": 1, "node": "attic", "host": "h", "port": 10128, "visit": "v"},
    "linked": {"kind": "linked", "id": 1},
    "unlinked": {"kind": "unlinked", "id": 1, "reason": "r"},
    "leaving": {"kind": "leaving"},
    "alive": {"kind": "alive"},
    "forward": {
        "kind": "forward",
        "id": 1,
        "first": 0,
        "segments": [[0, 0, 1, 0]],
        "route": [[0, 6]],
        "stages": [[0.5, 0.25, 1.5, 10]],
        "hidden": {"dtype": "float32", "shape": [1, 2]},
    },
    "result": {
        "kind": "result",
        "id": 1,
        "stages": [[0.5, 0.25, 1.5, 10]],
        "hidden": {"dtype": "float32", "shape": [1, 2]},
    },
}
PAYLOADS = {"forward": bytes(8), "result": bytes(8)}


def read(kind: str, payload: bytes | None = None, **changes: object) -> Message:
    """What the good header of that kind says once these fields are changed."""
    return from_header({**HEADERS[kind], **changes}, PAYLOADS.get(kind, b"") if payload is None else payload)


def as_lists(value: object) -> object:
    """What msgpack makes of a header: its tuples arrive as lists."""
    if isinstance(value, dict):
        return {key: as_lists(item) for key, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value


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


@pytest.mark.parametrize("message", [*EXAMPLES, Forget(()), replace(WELCOME, spans=())], ids=repr)
def test_round_trip(message: Message) -> None:
    header, payload = to_header(message)
    assert header["kind"] == message.kind
    assert from_header(as_lists(header), payload) == message


def test_the_tensor_travels_as_payload() -> None:
    header, payload = to_header(Result(7, REPORTS, TENSOR))
    assert header == {
        "kind": "result",
        "id": 7,
        "stages": REPORTS,
        "hidden": {"dtype": "bfloat16", "shape": (3, 2)},
    }
    assert payload == b"abcdefghijkl"


@pytest.mark.parametrize("kind", ["hello", "welcome"])
def test_a_greeting_of_another_version_is_understood_so_far(kind: str) -> None:
    older = {"kind": kind, "version": 1, "software": "cake/0.1.0", "node": "attic"}
    with pytest.raises(ProtocolError, match=f"version 1, this side speaks {VERSION}; run the same Cake"):
        from_header(older, b"")


@pytest.mark.parametrize("kind", HEADERS)
def test_the_headers_of_this_file_are_good(kind: str) -> None:
    assert read(kind).kind == kind


@pytest.mark.parametrize("header", [None, 1, "hello", [], [["kind", "hello"]], b"hello"])
def test_a_header_that_is_not_a_map(header: object) -> None:
    with pytest.raises(ProtocolError, match="must be a map"):
        from_header(header, b"")


@pytest.mark.parametrize("kind", ["", "Hello", "pickle", 1, None, ["hello"], {"kind": "hello"}])
def test_an_unknown_kind(kind: object) -> None:
    with pytest.raises(ProtocolError, match="unknown kind"):
        from_header({"kind": kind, "reason": "r"}, b"")


def test_no_kind() -> None:
    with pytest.raises(ProtocolError, match="unknown kind None"):
        from_header({"reason": "r"}, b"")


@pytest.mark.parametrize("kind", HEADERS)
def test_missing_and_extra_fields(kind: str) -> None:
    for field in HEADERS[kind].keys() - {"kind"}:
        less = {name: value for name, value in HEADERS[kind].items() if name != field}
        with pytest.raises(ProtocolError, match=f"a {kind} message has the fields"):
            from_header(less, PAYLOADS.get(kind, b""))
    if kind in ("hello", "welcome"):  # another version's fields must not hide that it is another
        assert read(kind, extra=1) == read(kind)
        return
    with pytest.raises(ProtocolError, match=f"a {kind} message has the fields"):
        read(kind, extra=1)


WRONG = {
    "whole number": ("lost", "held", [-1, True, False, 1.0, "1", None, [1], {}, b"1"]),
    "text": ("failed", "reason", [1, None, b"bytes", ["r"], {}, True]),
    "float": ("welcome", "clock", [1, True, "0.5", None, [0.5], {}]),
    "reports": (
        "result",
        "stages",
        [
            *(None, 1, "abc", {}, [1], [[]], ["abcd"]),
            *([[0.5, 0.5, 0.5]], [[0.5, 0.5, 0.5, 1, 1]], [[0.5, 0.5, 1, 1]]),
            *([[0.5, 0.5, 0.5, 0.5]], [[0.5, 0.5, 0.5, -1]]),
        ],
    ),
    "route": ("forward", "route", [None, 1, "ab", {}, [1], [[0]], [[0, 1, 2]], [[0, -1]], [[0, 1.0]]]),
    "whole numbers": ("forget", "sessions", [1, None, "12", {}, [-1], [True], [1.0], ["1"], [[1]], [None]]),
    "segments": (
        "forward",
        "segments",
        [
            None,
            1,
            "abc",
            {},
            [1],
            [[0, 0]],
            [[0, 0, 1]],
            [[0, 0, 1, 1, 1]],
            [[0, -1, 1, 0]],
            [[0, True, 1, 0]],
            [[0.0, 0, 1, 0]],
            [{}],
        ],
    ),
    "spans": (
        "welcome",
        "spans",
        [None, 1, "abc", {}, [1], [[0, 5]], [[0, 5, "a", "b"]], [[-1, 5, "a"]], [[0, 5, 1]], ["abc"]],
    ),
    "tensor": (
        "forward",
        "hidden",
        [
            None,
            [],
            "float32",
            {},
            {"dtype": "float32"},
            {"shape": [1, 2]},
            {"dtype": 1, "shape": [1, 2]},
            {"dtype": ["float32"], "shape": [1, 2]},
            {"dtype": "float32", "shape": None},
            {"dtype": "float32", "shape": 2},
            {"dtype": "float32", "shape": [-1, -2]},
            {"dtype": "float32", "shape": [True, 2]},
            {"dtype": "float32", "shape": [1.0, 2]},
        ],
    ),
}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        pytest.param(kind, field, value, id=f"{name}-{value}")
        for name, (kind, field, values) in WRONG.items()
        for value in values
    ],
)
def test_a_field_of_the_wrong_type(kind: str, field: str, value: object) -> None:
    with pytest.raises(ProtocolError, match=f"a {kind} message has a malformed field"):
        read(kind, **{field: value})


@pytest.mark.parametrize("kind", ["hello", "welcome", "lost", "failed", "forget"])
def test_a_payload_without_a_tensor(kind: str) -> None:
    with pytest.raises(ProtocolError, match="has no payload"):
        read(kind, payload=b"x")


@pytest.mark.parametrize(
    ("shape", "n_bytes"), [([1, 2], 7), ([1, 2], 9), ([1, 2], 0), ([0, 2], 4), ([], 8), ([2**63, 2], 8)]
)
def test_a_payload_that_does_not_fit_the_shape(shape: list[int], n_bytes: int) -> None:
    with pytest.raises(ProtocolError, match=f"bytes, not {n_bytes}$"):
        read("forward", bytes(n_bytes), hidden={"dtype": "float32", "shape": shape})


@pytest.mark.parametrize("dtype", ["float64", "int4", "", "Float32", "object"])
def test_an_unknown_dtype(dtype: str) -> None:
    with pytest.raises(ProtocolError, match="is unknown"):
        read("forward", hidden={"dtype": dtype, "shape": [1, 2]})


def test_a_shape_whose_product_has_too_many_digits_to_print() -> None:
    with pytest.raises(ProtocolError):
        read("forward", hidden={"dtype": "float32", "shape": [2**64 - 1] * 400})


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
