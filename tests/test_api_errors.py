"""Errors of the API that a test of the whole server does not come by: too much at once, and our own."""

import json
import logging
from typing import Any, cast

import pytest

from cake.api import service as service_module
from cake.api.errors import RETRY_AFTER_S, ApiError, api_error
from cake.api.openai.shapes import error_body
from cake.api.service import Service
from cake.errors import NodeLostError
from cake.generator import Generator
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


def test_a_lost_worker_is_no_fault_of_the_client() -> None:
    assert api_error(NodeLostError("worker 'pc' is gone")).status == 503
