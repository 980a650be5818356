"""A real HTTP server over a cluster of this process: what it shows, to whom, and how its streams end."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import GREEDY, CakeProcess
from http_served import Served, serving_http
from prometheus_client.parser import text_string_to_metric_families

from cake.session import Session


@pytest.fixture
async def served(tiny_model: Path) -> AsyncIterator[Served]:
    async with serving_http(tiny_model) as served:
        yield served


async def events_of(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line:
            assert line.startswith("data: ")
            yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("path", ["/api/v1/topology", "/api/v1/events", "/metrics"])
async def test_strangers_are_shown_nothing(served: Served, path: str) -> None:
    answer = await served.client.get(path, headers={"Authorization": "Bearer guessed"})
    assert answer.status_code == 401
    assert "w0" not in answer.text


async def test_the_topology_is_the_views_snapshot(served: Served) -> None:
    shown = (await served.client.get("/api/v1/topology")).json()
    assert [node["name"] for node in shown["nodes"]] == ["master", "w0"]
    assert [stage["span"] for stage in shown["pipeline"]] == [[0, 3], [3, 6]]
    assert shown.keys() == {"at", "model", "n_blocks", "context", "nodes", "pipeline", "rates"}


async def test_events_come_at_once_and_twice_a_second(served: Served) -> None:
    async with served.client.stream("GET", "/api/v1/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        times = []
        async for event in events_of(response):
            times.append(event["at"])
            if len(times) == 4:
                break
    assert times[3] - times[1] == pytest.approx(1.0, abs=0.25)


async def test_who_asks_for_the_head_of_a_stream_does_not_wait_for_its_end(served: Served) -> None:
    answer = await served.client.head("/api/v1/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert served.view.streams == 0


async def test_a_client_that_leaves_ends_its_stream(served: Served) -> None:
    async with served.client.stream("GET", "/api/v1/events") as response:
        await anext(events_of(response))
        assert served.view.streams == 1
    async with aclosing(served.view.events()) as events:
        async for _ in events:
            if served.view.streams == 1:  # this one
                break


async def test_a_client_that_leaves_ends_a_whole_answer_too(served: Served) -> None:
    body = {"model": "tiny", "prompt": [1, 2, 3]}
    whole = served.generator.pipeline.context - 3
    figures = served.generator.figures
    asking = asyncio.create_task(served.client.post("/v1/completions", json={**body, "max_tokens": whole}))
    while figures.tokens < 3:  # noqa: ASYNC110 - counters wake nobody
        await asyncio.sleep(0)
    asking.cancel()
    async with aclosing(served.view.events()) as events:
        async for event in events:
            if event["rates"]["requests"] == 0:
                break
    assert figures.tokens < whole // 4


@pytest.mark.parametrize("origin", ["https://example.org", "null", "http://127.0.0.1:1"])
async def test_pages_of_other_origins_may_not_ask(served: Served, origin: str) -> None:
    answer = await served.client.get("/v1/models", headers={"Origin": origin})
    assert answer.status_code == 403
    assert "Access-Control-Allow-Origin" not in answer.headers
    own = str(served.client.base_url).rstrip("/")
    assert (await served.client.get("/v1/models", headers={"Origin": own})).status_code == 200


async def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(served: Served) -> None:
    answer = await served.client.get("/", headers={"Authorization": ""})
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    for path in ("main.js", "style.css", "cake.svg"):
        assert (await served.client.get(f"/page/{path}", headers={"Authorization": ""})).status_code == 200
    assert (await served.client.get("/page/../app.py")).status_code == 404
    icon = await served.client.get("/favicon.ico", headers={"Authorization": ""})
    assert (icon.status_code, icon.headers["Content-Type"]) == (200, "image/svg+xml")


async def test_streams_end_with_the_view_so_that_a_server_need_not_wait(served: Served) -> None:
    async with served.client.stream("GET", "/api/v1/events") as response:
        events = events_of(response)
        await anext(events)
        served.view.close()
        rest = [event async for event in events]
    assert len(rest) <= 1


async def test_prometheus_is_told_what_was_done(served: Served) -> None:
    async for _ in served.generator.generate(Session(), [1, 2, 3], GREEDY, 5):
        pass
    await served.client.get("/v1/models/other")
    answer = await served.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    told = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert told["cake_tokens_total",] == 5
    assert told["cake_prompt_tokens_total",] == 3
    assert told["cake_first_token_seconds_count",] == 1
    assert told["cake_between_tokens_seconds_count",] == 4
    assert told["cake_between_tokens_seconds_bucket", "+Inf"] == 4
    assert told["cake_node_up", "w0"] == told["cake_node_up", "master"] == 1
    assert told["cake_node_memory_used_bytes", "w0"] > 50e6
    assert told["cake_kept_tokens",] == 0
    assert told["cake_http_requests_total", "/v1/models/{name:path}", "404"] == 1
    assert told["cake_waiting_requests",] == told["cake_replays_total",] == 0
    stats = served.generator.pipeline.stages[1].stats
    assert told["cake_stage_passes_total", "3-5", "w0"] == stats.passes == 5
    assert told["cake_stage_tokens_total", "3-5", "w0"] == 7
    assert told["cake_stage_sent_bytes_total", "3-5", "w0"] == stats.bytes_sent > 7 * 64 * 4
    assert told["cake_stage_network_seconds_total", "3-5", "w0"] == stats.network_s > 0
    assert told["cake_stage_compute_seconds_total", "0-2", "master"] > 0


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_ended_does_not_wait_for_those_who_watch(
    processes: Any, demo_model: Path, by: signal.Signals
) -> None:
    server: CakeProcess = processes("--model", demo_model, "--api", "127.0.0.1:0")
    url = server.wait_for(r"(http://127\.0\.0\.1:\d+)/v1")[1]
    with httpx2.stream("GET", f"{url}/api/v1/events", timeout=20) as response:
        assert next(response.iter_lines()).startswith("data: ")
        server.process.send_signal(by)
        server.process.wait(5)
    code, _, stderr = server.finish()
    assert code in (0, 130)
    assert "Traceback" not in stderr
