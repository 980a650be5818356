"""What those are told who ask whether the server is well."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from conftest import NoText, pipeline_over, serving
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from cake.api.health import health_endpoints
from cake.cluster_view import ClusterView
from cake.generator import Generator


def told(view: ClusterView) -> tuple[int, str]:
    """Status and state; all that is asked must fit together."""
    routes = [Route(each.path, each.handler) for each in health_endpoints(view, "tiny")]
    client = TestClient(Starlette(routes=routes))
    answer = client.get("/health")
    body = answer.json()
    assert body["ready"] == (answer.status_code == 200) == ("Retry-After" not in answer.headers)
    assert (body["live"], body["model"]) == (True, "tiny")
    assert client.get("/health/ready").status_code == answer.status_code
    assert client.get("/health/live").status_code == 200
    return answer.status_code, body["status"]


async def test_ready_degraded_unready_and_leaving(tiny_model: Path) -> None:
    async with AsyncExitStack() as stack:
        first, second = AsyncExitStack(), AsyncExitStack()
        nodes = [
            await first.enter_async_context(serving(tiny_model, "w0", range(3, 6))),
            await second.enter_async_context(serving(tiny_model, "w1", range(3, 6))),
        ]
        pipeline = await stack.enter_async_context(pipeline_over(tiny_model, *nodes))
        view = ClusterView(Generator(pipeline, NoText(), frozenset()), "tiny")  # type: ignore[arg-type]
        assert told(view) == (200, "ready")
        for each, expected in ((first, (200, "degraded")), (second, (503, "unready"))):
            lost = asyncio.create_task(pipeline.crew.news.wait(10))
            await asyncio.sleep(0)
            await each.aclose()
            await lost
            assert told(view) == expected
        view.close()
        assert told(view) == (503, "leaving")
