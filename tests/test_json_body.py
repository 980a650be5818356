"""Bodies that are no JSON, are called something else, or are too large."""

import pytest
from unloaded import client_of, unloaded_app

from cake.api.json_body import MOST_BODY_BYTES

READ = "model: Field required"  # the body `{}` was


async def answer_to(body: bytes, kind: str | None = "application/json") -> tuple[int, str]:
    async with client_of(unloaded_app()) as client:
        headers = {} if kind is None else {"Content-Type": kind}
        answer = await client.post("/v1/chat/completions", content=body, headers=headers)
    return answer.status_code, answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/problem+json",
        "application/x-www-form-urlencoded",
    ],
)
async def test_json_is_read_and_what_curl_takes_it_for(kind: str | None) -> None:
    assert await answer_to(b"{}", kind) == (400, READ)


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "text/xml", "", ";"])
async def test_another_kind_is_refused(kind: str) -> None:
    status, message = await answer_to(b"{}", kind)
    assert status == 415
    assert "application/json" in message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{}}",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"tools": [{"x": NaN}]}',
        b'{"tools": [{"x": -Infinity}]}',
        b'{"seed": 1' + 5000 * b"0" + b"}",
        100_000 * b"[",
        100_000 * b'{"a":',
        '{"model": "tiny"}'.encode("utf-16"),
    ],
)
async def test_what_is_no_json_is_told_so(body: bytes) -> None:
    status, message = await answer_to(body)
    assert status == 400
    assert message.startswith("the body is no JSON: ")


async def test_a_body_may_not_be_larger_than_there_is_room_for() -> None:
    assert await answer_to(b"{}" + (MOST_BODY_BYTES - 2) * b" ") == (400, READ)
    assert (await answer_to(b"{}" + (MOST_BODY_BYTES - 1) * b" "))[0] == 413


@pytest.mark.parametrize("body", [b"null", b"[]", b"1", b'"text"'])
async def test_json_that_is_no_object_is_told_so(body: bytes) -> None:
    assert await answer_to(body) == (400, "Input should be an object")
