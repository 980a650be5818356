"""What the API's description promises, asked of a real server with two real workers, as nobody would ask it.

`schemathesis` makes requests of the description, such as are allowed and such as are not, and holds the
answers against it: every limit of every field, and `CAKE_API_CASES` drawn ones for each operation.
"""

import asyncio
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from conftest import CakeProcess
from http_served import message_in
from jsonschema import Draft202012Validator
from real_processes import start_workers
from speaking_model import make_speaking_llama
from unloaded import client_of, unloaded_app

from cake.api.handlers import LINES

schemathesis = pytest.importorskip("schemathesis")  # which wants Python 3.11
config = pytest.importorskip("schemathesis.config")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
pytestmark = [pytest.mark.xdist_group("schema"), pytest.mark.timeout(1200)]
MODEL = "tiny"
KEY = "not a secret"
ALWAYS_THE_SAME = "CAKE_API_CASES" not in os.environ  # else other cases each time
CASES = int(os.environ.get("CAKE_API_CASES", "10"))
CONTEXT = 48  # so that no answer is long


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    started: list[CakeProcess] = []

    def start(*arguments: object) -> CakeProcess:
        started.append(CakeProcess(*arguments))
        return started[-1]

    model = make_speaking_llama(tmp_path_factory.mktemp("models") / MODEL)
    cluster = start_workers(start, tmp_path_factory.mktemp("schema"), "0-2", "3-5", model=model)
    options = ("--topology", cluster.topology, "--api", "127.0.0.1:0", "--api-key", KEY, "--context", CONTEXT)
    server = start("--model", model, *options)
    try:
        yield server.wait_for(r"(http://127\.0\.0\.1:\d+)/v1")[1]
    finally:
        for process in started:
            process.process.kill()
            process.finish()


def described() -> Any:
    """As the server describes itself, which another test looks at."""

    async def ask() -> httpx2.Response:
        async with client_of(unloaded_app(MODEL, KEY)) as client:
            return await client.get("/openapi.json")

    return asyncio.run(ask()).json()


# Why a request may be refused that a schema allows: what depends on two fields, on the model, or is too long.
BEYOND_SCHEMAS = re.compile(
    "the prompt is empty|the context holds|names the token|stream_options is for|top_logprobs needs|"
    "echo with logprobs|needs a json_schema|do not go together|tool_choice asks|tool_choice names|"
    "two tools are called|are no JSON|the schema cannot be read|no text can be held|"
    "an answer that goes on|num_ctx is"
)
CONFIG = {
    "generation": {
        "max-examples": CASES,
        "deterministic": ALWAYS_THE_SAME,
        "database": "none",
        "no-shrink": True,
    },
    "auth": {"openapi": {"bearer": {"bearer": KEY}}},
    "max-stream-events": 3,
    "request-timeout": 20,
}
DOCUMENT = described()
schema = schemathesis.openapi.from_dict(DOCUMENT, config=config.SchemathesisConfig.from_dict(CONFIG))


def reader_of(said: Any, media: str) -> Any:
    """What holds JSON against the schema of a body or an answer."""
    return Draft202012Validator({**said["content"][media]["schema"], "components": DOCUMENT["components"]})


def is_allowed(case: Any) -> bool:
    """Whether its body is such as is described."""
    body = case.operation.definition.raw.get("requestBody")
    return body is not None and reader_of(body, "application/json").is_valid(case.body)


@schema.exclude(path="/api/v1/chat/completions").parametrize()  # which is said to be the same
def test_answers_are_such_as_they_are_described(case: Any, url: str) -> None:
    excluded = [checks.positive_data_acceptance]
    if is_allowed(case):  # `schemathesis` can mistake what one of several kinds forbids and another allows
        excluded.append(checks.negative_data_rejection)
    response = case.call_and_validate(base_url=url, excluded_checks=excluded)
    if response.status_code == 400 and case.meta.generation.mode.is_positive:
        assert BEYOND_SCHEMAS.search(message_in(response.json()))
    if response.headers["content-type"] == [LINES]:  # which `schemathesis` does not look at
        each = reader_of(case.operation.definition.raw["responses"]["200"], LINES)
        for line in response.text.splitlines():
            each.validate(json.loads(line))


def test_the_server_describes_itself_like_this(url: str) -> None:
    assert httpx2.get(f"{url}/openapi.json", timeout=20).json() == DOCUMENT
