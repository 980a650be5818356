"""A real HTTP server over a cluster of this process: what tests of it share."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from conftest import GREEDY, NoText, pipeline_over, serving
from torch import Tensor

from cake.api.app import build_app
from cake.api.server import listen_at, serve, url_of
from cake.api.service import Service
from cake.cluster_view import ClusterView
from cake.generator import Generator

KEY = {"Authorization": "Bearer sesame"}


class Served(NamedTuple):
    """A server that runs."""

    url: str
    client: httpx2.AsyncClient
    generator: Generator
    view: ClusterView
    task: "asyncio.Task[None]"


@asynccontextmanager
async def serving_http(tiny_model: Path, api_key: str | None = "sesame") -> AsyncIterator[Served]:
    """A master and a worker of this process, and a client that knows the key."""
    async with AsyncExitStack() as stack:
        w0 = await stack.enter_async_context(serving(tiny_model, "w0", range(3, 6)))
        pipeline = await stack.enter_async_context(pipeline_over(tiny_model, w0))
        generator = Generator(pipeline, NoText(), frozenset())  # type: ignore[arg-type]
        view, listening = ClusterView(generator, "tiny"), stack.enter_context(listen_at("127.0.0.1:0"))
        await stack.enter_async_context(view.watched())
        app = build_app(Service(generator, "tiny", GREEDY), view, api_key)
        task = asyncio.create_task(serve(app, listening, view.close))
        client = httpx2.AsyncClient(base_url=url_of(listening), headers=KEY, timeout=20)
        await stack.enter_async_context(client)
        yield Served(url_of(listening), client, generator, view, task)
        task.cancel()
        await asyncio.wait([task])


class Gate:
    """Lets a generator make tokens pass by pass: as many as are allowed."""

    def __init__(self, generator: Generator, n: int) -> None:
        self._passes, self._choose = asyncio.Semaphore(n), generator.pipeline.choose
        generator.pipeline.choose = self._wait  # type: ignore[method-assign]

    async def _wait(self, hidden: Tensor, choice: Callable[[Tensor], Any]) -> Any:
        await self._passes.acquire()
        return await self._choose(hidden, choice)

    def allow(self, n: int) -> None:
        """So many passes more."""
        for _ in range(n):
            self._passes.release()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what wakes nobody, such as a counter."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


def request(path: str, body: Mapping[str, Any], length: int | None = None) -> bytes:
    """A request as it goes over the wire, which may promise another length than it has."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {KEY['Authorization']}\r\n"
    return f"{head}Content-Length: {len(content) if length is None else length}\r\n\r\n".encode() + content


def message_in(body: Any) -> str:
    """The words of an error, wherever a dialect has them."""
    error: Any = body["error"]
    return str(error if isinstance(error, str) else error["message"])


def shape_of(body: Any) -> str:
    """In which dialect an error is told."""
    if isinstance(body["error"], str):
        return "ollama"
    return "anthropic" if body.get("type") == "error" else "openai"
