"""Frames: literal bytes, every way of cutting them up, and nonsense of all kinds."""

import itertools
import struct
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cake
from cake.errors import ProtocolError
from cake.protocol.frames import HANDSHAKE_LIMITS, FrameReader, Limits, encode
from cake.protocol.messages import (
    MESSAGES,
    Alive,
    Forget,
    Forward,
    Goodbye,
    Hello,
    Message,
    WireSegment,
    WireTensor,
)

WIDE = Limits(header=64 * 1024, payload=64 * 1024)

HELLO = Hello(1, "x", "attic", "")
HELLO_BYTES = bytes.fromhex(
    "43414b45 00000032 0000000000000000"  # "CAKE", 50 bytes of header, no payload
    "85"  # a map of 5
    "a4 6b696e64 a5 68656c6c6f"  # kind: hello
    "a7 76657273696f6e 01"  # version: 1
    "a8 736f667477617265 a1 78"  # software: x
    "a4 6e6f6465 a5 6174746963"  # node: attic
    "a5 7669736974 a0"  # visit: empty
)
FORWARD = Forward(
    7,
    2,
    (WireSegment(1, 300, 2, 1),),
    (),
    (),
    WireTensor("float32", (2, 1), bytes.fromhex("0000803f000000c0")),
)
FORWARD_BYTES = bytes.fromhex(
    "43414b45 00000058 0000000000000008"  # "CAKE", 88 bytes of header, 8 of payload
    "87"  # a map of 7
    "a4 6b696e64 a7 666f7277617264"  # kind: forward
    "a2 6964 07"  # id: 7
    "a5 6669727374 02"  # first: 2
    "a8 7365676d656e7473 91 94 01 cd012c 02 01"  # segments: [[1, 300, 2, 1]]
    "a5 726f757465 90"  # route: it ends here
    "a6 737461676573 90"  # stages: none before
    "a6 68696464656e 82"  # hidden: a map of 2
    "a5 6474797065 a7 666c6f61743332"  # dtype: float32
    "a5 7368617065 92 02 01"  # shape: [2, 1]
    "0000803f 000000c0"  # 1.0, -2.0
)
STREAM = HELLO_BYTES + FORWARD_BYTES + HELLO_BYTES
STREAM_MESSAGES = [HELLO, FORWARD, HELLO]


def messages(reader: FrameReader, data: bytes) -> list[Message]:
    return [frame.message for frame in reader.feed(data)]


def prefix(header: int, payload: int, magic: bytes = b"CAKE") -> bytes:
    return struct.pack(">4sIQ", magic, header, payload)


def framed(header: object, payload: bytes = b"") -> bytes:
    packed = msgpack.packb(header)
    return prefix(len(packed), len(payload)) + packed + payload


@pytest.mark.parametrize(
    ("message", "wire"), [(HELLO, HELLO_BYTES), (FORWARD, FORWARD_BYTES)], ids=["hello", "forward"]
)
def test_literal_bytes(message: Message, wire: bytes) -> None:
    assert b"".join(encode(message)) == wire
    reader = FrameReader(WIDE)
    frames = list(reader.feed(wire))
    assert [frame.message for frame in frames] == [message]
    assert [frame.n_bytes for frame in frames] == [len(wire)]
    assert not reader.mid_frame


def test_the_payload_is_not_copied_to_be_sent() -> None:
    data = bytearray(8)
    message = Forward(0, 0, (WireSegment(0, 0, 2, 0),), (), (), WireTensor("float32", (2, 1), data))
    assert encode(message)[1] is data


def test_several_frames_in_one_piece() -> None:
    assert messages(FrameReader(WIDE), STREAM) == STREAM_MESSAGES


def test_byte_by_byte() -> None:
    reader = FrameReader(WIDE)
    ends = {len(HELLO_BYTES), len(HELLO_BYTES + FORWARD_BYTES), len(STREAM)}
    got = []
    for n, byte in enumerate(STREAM, 1):
        got += messages(reader, bytes([byte]))
        assert reader.mid_frame == (n not in ends)
    assert got == STREAM_MESSAGES


@given(st.lists(st.integers(0, len(STREAM))))
@settings(deadline=None)
def test_random_pieces(cuts: list[int]) -> None:
    reader = FrameReader(WIDE)
    edges = [0, *sorted(cuts), len(STREAM)]
    got = []
    for start, stop in itertools.pairwise(edges):
        got += messages(reader, STREAM[start:stop])
    assert got == STREAM_MESSAGES


def test_a_payload_outlives_the_frames_that_follow() -> None:
    reader = FrameReader(WIDE)
    first, _, _ = messages(reader, FORWARD_BYTES + HELLO_BYTES + FORWARD_BYTES)
    messages(reader, HELLO_BYTES * 3)
    assert first == FORWARD


@pytest.mark.parametrize("wrong", [b"X", b"CX", b"CAX", b"CAKX", b"cake", b"\0", b"GET / HTTP/1.1\r\n\r\n"])
def test_wrong_magic_is_noticed_with_the_first_wrong_byte(wrong: bytes) -> None:
    reader = FrameReader()
    right = next(n for n in range(len(wrong)) if not b"CAKE".startswith(wrong[: n + 1]))
    assert messages(reader, wrong[:right]) == []
    with pytest.raises(ProtocolError, match="wrong magic"):
        messages(reader, wrong[right : right + 1])


def test_wrong_magic_after_a_good_frame() -> None:
    with pytest.raises(ProtocolError, match="wrong magic"):
        messages(FrameReader(), HELLO_BYTES + b"\0")


@pytest.mark.parametrize(
    ("header", "payload", "reason"),
    [
        (4097, 0, "a header of 4097 bytes is over the limit 4096"),
        (2**32 - 1, 0, "a header of 4294967295 bytes"),
        (10, 1, "a payload of 1 bytes is over the limit 0"),
        (10, 3 * 2**30, "a payload of 3221225472 bytes"),
        (10, 2**63, "a payload of 9223372036854775808 bytes"),
        (10, 2**64 - 1, "a payload of 18446744073709551615 bytes"),
    ],
)
def test_a_length_over_the_limit_is_refused_with_the_prefix(header: int, payload: int, reason: str) -> None:
    reader, data = FrameReader(HANDSHAKE_LIMITS), prefix(header, payload)
    assert messages(reader, data[:-1]) == []
    with pytest.raises(ProtocolError, match=reason):
        messages(reader, data[-1:])


def test_lengths_at_the_limit_are_allowed() -> None:
    packed = len(FORWARD_BYTES) - 16 - 8
    assert messages(FrameReader(Limits(packed, 8)), FORWARD_BYTES) == [FORWARD]
    with pytest.raises(ProtocolError, match="header"):
        messages(FrameReader(Limits(packed - 1, 8)), FORWARD_BYTES)
    with pytest.raises(ProtocolError, match="payload"):
        messages(FrameReader(Limits(packed, 7)), FORWARD_BYTES)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",  # never used in msgpack
        b"\x81\xa4kind",  # a map that ends too early
        b"\x80\x80",  # more than one value
        b"\xa1\xff",  # text that is not UTF-8
        b"\xdf\xff\xff\xff\xff",  # a map of 2**32 - 1
        b"\xdd\xff\xff\xff\xff",  # a list of 2**32 - 1
        b"\x91" * 4000 + b"\x01",  # deep
        b"\x83\xa4kind\xa5hello\xa7version\x04\xa1z"
        + b"\x91" * 4000
        + b"\x01",  # deep where any field may be
    ],
)
def test_a_header_that_is_not_msgpack(header: bytes) -> None:
    with pytest.raises(ProtocolError, match="not msgpack"):
        messages(FrameReader(), prefix(len(header), 0) + header)


def test_limits_raised_between_messages_hold_for_what_is_already_there() -> None:
    reader, got = FrameReader(), []
    for frame in reader.feed(HELLO_BYTES + FORWARD_BYTES):
        got.append(frame.message)
        reader.limits = WIDE
    assert got == [HELLO, FORWARD]
    with pytest.raises(ProtocolError, match="over the limit"):
        messages(FrameReader(), HELLO_BYTES + FORWARD_BYTES)


def assert_survives(data: bytes) -> None:
    """Feed a reader; whatever it makes of the bytes, it raises nothing but `ProtocolError`."""
    try:
        got = messages(FrameReader(WIDE), data)
    except ProtocolError:
        return
    assert all(isinstance(message, Message) for message in got)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_random_bytes(data: bytes) -> None:
    assert_survives(data)


@given(st.binary(max_size=100), st.integers(0, 50))
@settings(deadline=None)
def test_random_bytes_as_header(header: bytes, n_payload: int) -> None:
    assert_survives(prefix(len(header), n_payload) + header + bytes(n_payload))


@given(st.lists(st.tuples(st.integers(0, len(STREAM) - 1), st.integers(0, 255)), min_size=1, max_size=5))
@settings(deadline=None)
def test_mutated_streams(changes: list[tuple[int, int]]) -> None:
    data = bytearray(STREAM)
    for at, value in changes:
        data[at] = value
    assert_survives(bytes(data))


LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["float32", "bfloat16", "float16", "int8"]) | VALUES,
        "shape": st.lists(st.integers(0, 2**64 - 1), max_size=4) | VALUES,
    }
)


@given(st.data(), st.sampled_from(sorted(MESSAGES)), st.binary(max_size=16))
@settings(deadline=None, max_examples=300)
def test_well_framed_headers_with_arbitrary_fields(data: st.DataObject, kind: str, payload: bytes) -> None:
    fields = MESSAGES[kind].__struct_fields__
    header = {name: data.draw(TENSORS | VALUES if name == "hidden" else VALUES) for name in fields}
    assert_survives(framed({"kind": kind, **header}, payload))


@given(
    st.one_of(
        st.builds(Hello, st.integers(0, 2**64 - 1), st.text(), st.text()),
        st.builds(Goodbye, st.text()),
        st.builds(Forget, st.lists(st.integers(0, 2**64 - 1)).map(tuple)),
    )
)
@settings(deadline=None)
def test_any_message_comes_back(message: Message) -> None:
    assert messages(FrameReader(WIDE), b"".join(encode(message))) == [message]


def test_who_is_alive_tells_of_its_memory_in_these_bytes() -> None:
    head, payload = encode(Alive(memory_used=256, memory_total=2**35))
    header = b"\x83\xa4kind\xa5alive\xabmemory_used\xcd\x01\x00\xacmemory_total\xcf\0\0\0\x08\0\0\0\0"
    assert head == b"CAKE" + len(header).to_bytes(4, "big") + bytes(8) + header
    assert not payload


def test_the_documentation_shows_the_bytes_that_are_sent() -> None:
    text = (Path(cake.__file__).parent / "protocol" / "PROTOCOL.md").read_text(encoding="utf-8")
    block = next(part for part in text.split("```") if part.lstrip().startswith("43 41 4b 45"))
    head, payload = encode(Hello(version=4, software="cake/0.1.0", node="worker0", visit=""))
    assert bytes.fromhex(block) == head
    assert not payload
