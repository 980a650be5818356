"""Headers: every kind goes there and back, and nothing malformed becomes a message.

`msgpack`, which has nothing to do with the library that Cake uses, writes and reads the other side.
"""

import msgpack
import pytest
from msgspec import structs
from test_messages import EXAMPLES, REPORTS, TENSOR, WELCOME

from cake.errors import ProtocolError
from cake.protocol.codec import pack, unpack
from cake.protocol.messages import VERSION, Forget, Message, Result

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
    "alive": {"kind": "alive", "memory_used": 1, "memory_total": 2},
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
    return said({**HEADERS[kind], **changes}, PAYLOADS.get(kind, b"") if payload is None else payload)


def said(header: object, payload: bytes = b"") -> Message:
    """What a header says that another library packed."""
    return unpack(msgpack.packb(header), payload)


@pytest.mark.parametrize("message", [*EXAMPLES, Forget(()), structs.replace(WELCOME, spans=())], ids=repr)
def test_round_trip(message: Message) -> None:
    header, payload = pack(message)
    assert msgpack.unpackb(header)["kind"] == message.kind
    assert unpack(header, payload) == message


def test_the_tensor_travels_as_payload() -> None:
    header, payload = pack(Result(7, REPORTS, TENSOR))
    assert msgpack.unpackb(header) == {
        "kind": "result",
        "id": 7,
        "stages": [list(report) for report in REPORTS],
        "hidden": {"dtype": "bfloat16", "shape": [3, 2]},
    }
    assert payload == b"abcdefghijkl"


@pytest.mark.parametrize("kind", ["hello", "welcome"])
def test_a_greeting_of_another_version_is_understood_so_far(kind: str) -> None:
    older = {"kind": kind, "version": 1, "software": "cake/0.1.0", "node": "attic"}
    with pytest.raises(ProtocolError, match=f"version 1, this side speaks {VERSION}; run the same Cake"):
        said(older)


@pytest.mark.parametrize("kind", HEADERS)
def test_the_headers_of_this_file_are_good(kind: str) -> None:
    assert read(kind).kind == kind


@pytest.mark.parametrize("header", [None, 1, "hello", [], [["kind", "hello"]], b"hello"])
def test_a_header_that_is_not_a_map(header: object) -> None:
    with pytest.raises(ProtocolError, match="must be a map"):
        said(header)


@pytest.mark.parametrize("kind", ["", "Hello", "pickle", 1, None, ["hello"], {"kind": "hello"}])
def test_an_unknown_kind(kind: object) -> None:
    with pytest.raises(ProtocolError, match="unknown kind"):
        said({"kind": kind, "reason": "r"})


def test_no_kind() -> None:
    with pytest.raises(ProtocolError, match="unknown kind None"):
        said({"reason": "r"})
    with pytest.raises(ProtocolError, match="unknown kind None"):
        said({1: 2})


@pytest.mark.parametrize("kind", HEADERS)
def test_missing_and_extra_fields(kind: str) -> None:
    for field in HEADERS[kind].keys() - {"kind"}:
        less = {name: value for name, value in HEADERS[kind].items() if name != field}
        with pytest.raises(ProtocolError, match=f"a malformed {kind} message: .*missing required field"):
            said(less, PAYLOADS.get(kind, b""))
    if kind in ("hello", "welcome"):  # another version's fields must not hide that it is another
        assert read(kind, extra=1) == read(kind)
        return
    with pytest.raises(ProtocolError, match=f"a malformed {kind} message: .*unknown field `extra`"):
        read(kind, extra=1)


WRONG = {
    "whole number": ("lost", "held", [-1, True, False, 1.0, "1", None, [1], {}, b"1"]),
    "text": ("failed", "reason", [1, None, b"bytes", ["r"], {}, True]),
    "float": ("welcome", "clock", [True, "0.5", None, [0.5], {}]),
    "reports": (
        "result",
        "stages",
        [
            *(None, 1, "abc", {}, [1], [[]], ["abcd"]),
            *([[0.5, 0.5, 0.5]], [[0.5, 0.5, 0.5, 1, 1]], [[0.5, 0.5, "1", 1]]),
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
    with pytest.raises(ProtocolError, match=f"a malformed {kind} message: (Expected|Object missing)"):
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


def test_what_is_said_of_a_peers_words_is_one_short_line() -> None:
    with pytest.raises(ProtocolError) as error:
        read("failed", **{"a\n\x1b[31mb" * 100: 1})
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 250
