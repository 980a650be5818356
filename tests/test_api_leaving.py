"""A server that is told to end: it answers what it has begun, and sends others away."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import CakeProcess
from http_served import Gate, Served, serving_http, shape_of

FEW = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 8}
STORY = {"messages": [{"role": "user", "content": "Tell a long story."}], "stream": True}


@pytest.fixture
async def served(tiny_model: Path) -> AsyncIterator[Served]:
    async with serving_http(tiny_model) as served:
        yield served


async def test_what_was_begun_is_answered_and_others_are_told_to_come_back(served: Served) -> None:
    gate = Gate(served.generator, 1)
    whole = asyncio.create_task(served.client.post("/v1/completions", json=FEW))
    async with served.client.stream("POST", "/v1/completions", json={**FEW, "stream": True}) as stream:
        lines = stream.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        signal.raise_signal(signal.SIGTERM)
        refused = await served.client.post("/v1/completions", json=FEW)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        assert refused.json()["error"]["code"] == "leaving"
        for path, shape in (("/api/chat", "ollama"), ("/v1/messages", "anthropic")):
            refused = await served.client.post(path, json=FEW)
            assert (refused.status_code, shape_of(refused.json())) == (503, shape)
        assert not served.task.done()
        gate.allow(100)
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    assert (await whole).json()["usage"]["completion_tokens"] == 8
    await served.task


async def test_the_second_time_it_ends_at_once(served: Served) -> None:
    Gate(served.generator, 1)
    async with served.client.stream("POST", "/v1/completions", json={**FEW, "stream": True}) as stream:
        lines = stream.aiter_lines()
        await anext(lines)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        await served.task
        with pytest.raises(httpx2.RemoteProtocolError):
            [line async for line in lines]
    assert served.generator.figures.answering == 0


@pytest.mark.parametrize(
    "told", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM], [signal.SIGTERM]], ids=str
)
def test_a_process_ends_amid_an_answer_without_ado(
    processes: Any, demo_model: Path, told: list[signal.Signals]
) -> None:
    process: CakeProcess = processes("--model", demo_model, "--api", "127.0.0.1:0")
    model, url = process.wait_for(r"answering (\S+) at (http://127\.0\.0\.1:\d+)/v1").groups()
    body = {"model": model, "max_tokens": 40, **STORY}
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        for each in told:
            process.process.send_signal(each)
            if len(told) > 1:
                refused(url, model)
        if told == [signal.SIGTERM]:
            assert "data: [DONE]" in list(lines)
        code, _, stderr = process.finish()  # the client is there until the end
    assert code == (130 if signal.SIGINT in told else 0)
    assert not re.search("Traceback|Error|error", stderr)


def refused(url: str, model: str) -> None:
    """Ask until the server says that it leaves, or is gone."""
    try:
        while httpx2.post(f"{url}/v1/completions", json={"model": model, "prompt": "a"}).status_code != 503:
            pass
    except httpx2.TransportError:
        pass
