"""What makes no sense to a worker: it ends the connection that it came over, and no other."""

import random
from pathlib import Path

import pytest
from msgspec import structs
from test_connection import wire
from test_worker import HELLO, between_good_masters, forward, prefix, raw, warnings, zeros

from cake.protocol.messages import (
    VERSION,
    Alive,
    Failed,
    Forget,
    Goodbye,
    Lost,
    Message,
    Result,
    Welcome,
)
from cake.stage import LocalStage

BEFORE_HELLO = {
    "wrong magic": (b"CAKF" + bytes(12), "wrong magic"),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: porch\r\n\r\n", "wrong magic"),
    "noise": (random.Random(1).randbytes(1024), "wrong magic"),
    "header of 4 GiB": (prefix(2**32 - 1, 0), "a header of 4294967295 bytes is over the limit"),
    "payload of 2**63": (prefix(10, 2**63), "a payload of 9223372036854775808 bytes is over the limit"),
    "3 GB, 64 bytes of it": (prefix(64, 3 * 2**30) + bytes(64), "a payload of 3221225472 bytes is over"),
    "truncated hello": (wire(HELLO)[:-1], "the connection ended in the middle of a frame"),
    "unknown kind": (prefix(13, 0) + b"\x81\xa4kind\xa6pickle", "unknown kind 'pickle'"),
    "not msgpack": (prefix(3, 0) + b"\xc1\xc1\xc1", "not msgpack"),
    "forget first": (wire(Forget((1,))), "a forget message from the master is out of order"),
    "empty forward first": (wire(forward()), "a forward message from the master is out of order"),
    "forward first": (wire(forward((0, 0, 1))), "a payload of 256 bytes is over the limit 0"),
    "goodbye first": (wire(Goodbye("oops")), "a goodbye message from the master is out of order"),
    "other version": (
        wire(structs.replace(HELLO, version=9)),
        f"speaks protocol version {VERSION}, the master",
    ),
    "other node": (wire(structs.replace(HELLO, node="attic")), "this worker is 'porch', not 'attic'"),
    "hello and forward at once": (wire(HELLO, forward()), "a forward message from the master is out of"),
}
WELCOME = Welcome(VERSION, "test", "porch", "m", (), "cpu", "float32", "float32", 512, 2048, "", 0.0)
AFTER_HELLO = {
    "wrong magic": (b"GET / HTTP/1.1\r\n\r\n", "wrong magic"),
    "header over the limit": (prefix(65537, 0), "a header of 65537 bytes is over the limit 65536"),
    "payload of 2**63": (prefix(10, 2**63), "a payload of 9223372036854775808 bytes is over the limit"),
    "3 GB, 64 bytes of it": (prefix(64, 3 * 2**30) + bytes(64), "a payload of 3221225472 bytes is over"),
    "truncated forward": (wire(forward((0, 0, 9)))[:-1], "the connection ended in the middle of a frame"),
    "second hello": (wire(HELLO), "a hello message from the master is out of order"),
    "welcome": (wire(WELCOME), "a welcome message from the master is out of order"),
    "result": (wire(Result(0, (), zeros(1, 64))), "a result message from the master is out of order"),
    "no such span": (wire(forward((0, 0, 1), first=1)), "no span here begins at block 1"),
    "beyond the model": (wire(forward((0, 0, 1), first=2**64 - 1)), "no span here begins at block"),
    "too few rows": (wire(forward((0, 0, 3), hidden=zeros(2, 64))), r"[2, 64] do not fit 3 tokens"),
    "too many rows": (wire(forward((0, 0, 1), hidden=zeros(2, 64))), "[2, 64] do not fit 1 tokens"),
    "other width": (wire(forward((0, 0, 2), hidden=zeros(2, 63))), "[2, 63] do not fit 2 tokens"),
    "one dimension": (wire(forward((0, 0, 2), hidden=zeros(128))), "[128] do not fit 2 tokens"),
    "empty batch": (wire(forward()), "a batch has 1 to 2048 tokens, not 0"),
    "empty segment": (wire(forward((0, 0, 1), (1, 0, 0))), "the segment of session 1 is empty"),
    "same session twice": (wire(forward((3, 0, 1), (3, 1, 1))), "two segments of a batch are of the same"),
    "a byte too many": (prefix(64, 2**19 + 1), "a payload of 524289 bytes is over the limit 524288"),
    "2049 tokens": (wire(forward((0, 0, 2049), hidden=zeros(1, 64))), "1 to 2048 tokens, not 2049"),
    "2**64 tokens": (wire(forward((0, 0, 2**64 - 1), hidden=zeros(1, 64))), "1 to 2048 tokens"),
}


@pytest.mark.parametrize(
    ("first", "data", "reason"),
    [
        *(pytest.param([], *row, id=f"before hello: {name}") for name, row in BEFORE_HELLO.items()),
        *(pytest.param([HELLO], *row, id=f"after hello: {name}") for name, row in AFTER_HELLO.items()),
    ],
)
async def test_nonsense_ends_only_its_own_connection(
    tiny_model: Path, here: LocalStage, caplog, first: list[Message], data: bytes, reason: str
) -> None:
    async with between_good_masters(tiny_model, here) as node, raw(node, *first) as master:
        address = "{}:{}".format(*master.writer.get_extra_info("sockname"))
        master.writer.write(data)
        if "in the middle" in reason:
            master.writer.write_eof()
        said = await master.hear_all()
        assert isinstance(said[-1], Goodbye)
        assert reason in said[-1].reason
        assert not any(isinstance(message, Result | Failed | Lost) for message in said)
    (line,) = warnings(caplog)
    assert address in line
    assert reason in line


async def test_noise_does_not_take_back_what_came_before_it(tiny_model: Path, here: LocalStage) -> None:
    async with between_good_masters(tiny_model, here) as node, raw(node, HELLO) as master:
        master.writer.write(wire(forward((0, 0, 1))) + b"\0")
        *answers, last = [m for m in await master.hear_all() if not isinstance(m, Welcome | Alive)]
        assert isinstance(last, Goodbye)
        assert "wrong magic" in last.reason
        assert [type(answer) for answer in answers] in ([], [Result])
