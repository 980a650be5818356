"""Errors of the API that a test of the whole server does not come by: too much at once, and our own."""

import json
import logging
from pathlib import Path
from typing import Any, cast

import pytest
from http_served import serving_http

from cake import errors
from cake.api import service as service_module
from cake.api.errors import RETRY_AFTER_S, ApiError, api_error
from cake.api.openai.shapes import error_body
from cake.api.service import Service
from cake.departures import Departures
from cake.errors import (
    CakeError,
    CheckpointError,
    ClusterKeyError,
    GrammarError,
    NodeError,
    NodeLostError,
    PromptTooLongError,
    ProtocolError,
    SessionLostError,
    SetupError,
    TopologyError,
)
from cake.generator import Generator, check_prompt
from cake.model.sampling import SamplingParams


def test_more_requests_than_there_is_room_for_are_told_when_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service_module, "MOST_REQUESTS", 2)
    service = Service(cast("Generator", None), "model", SamplingParams())
    with service.room(), service.room():
        with pytest.raises(ApiError) as told, service.room():
            pass
        response = told.value.response(error_body)
    assert (response.status_code, response.headers["Retry-After"]) == (503, str(RETRY_AFTER_S))
    with service.room():  # when one has left
        pass


def test_an_error_of_our_own_can_be_found_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        told = api_error(RuntimeError("a secret path"))
    body: dict[str, Any] = json.loads(bytes(told.response(error_body).body))
    assert told.status == 500
    assert "secret" not in body["error"]["message"]
    (record,) = caplog.records
    assert record.getMessage().split()[-1] in body["error"]["message"]
    assert record.exc_info is not None


KINDS = [each for each in vars(errors).values() if isinstance(each, type)]
STATUS = {
    TopologyError: 500,
    CheckpointError: 500,
    PromptTooLongError: 400,
    GrammarError: 400,
    SetupError: 500,
    NodeError: 503,
    NodeLostError: 503,
    ProtocolError: 503,
    ClusterKeyError: 503,
    CakeError: 400,
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_whose_fault_an_error_is_decides_its_status(kind: type[CakeError]) -> None:
    if kind is SessionLostError:
        told = api_error(SessionLostError(3, 0))
        assert (told.status, told.code) == (503, "out_of_memory")
        return
    told = api_error(kind("worker 'pc' says why"))
    assert told.status == STATUS[kind]
    assert "worker 'pc' says why" in str(told)
    assert ("Retry-After" in told.response(error_body).headers) == (told.status == 503)


def test_a_prompt_that_is_too_long_is_told_its_length_and_the_context() -> None:
    with pytest.raises(PromptTooLongError) as error:
        check_prompt([1] * 600, 512, 256)
    told = api_error(error.value)
    assert (told.status, told.code) == (400, "context_length_exceeded")
    assert "600 tokens and the context holds 512" in str(told)


async def test_a_mistake_of_our_own_is_told_at_once_and_the_server_goes_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def mistake(*arguments: object) -> None:
        raise RuntimeError("a mistake")

    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2}
    async with serving_http(tiny_model) as served:
        with monkeypatch.context() as changed:
            changed.setattr(Departures, "_take_few", mistake)
            answer = await served.client.post("/v1/completions", json=body)
        assert answer.status_code == 500
        number = caplog.records[-1].getMessage().split()[-1]
        assert number in answer.json()["error"]["message"]
        assert (await served.client.post("/v1/completions", json=body)).status_code == 200
        assert (await served.client.get("/health")).json()["status"] == "ready"
