"""The HTTP application: OpenAI's routes over a service."""

import asyncio
import contextlib
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cake.api.answers import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    ErrorAnswer,
    Health,
    LastChatChunk,
    ModelCard,
    ModelList,
)
from cake.api.cluster import cluster_endpoints
from cake.api.errors import ApiError, api_error
from cake.api.gate import Gate
from cake.api.handlers import EVENTS, About, Endpoint, Handler, event
from cake.api.json_body import read_json
from cake.api.metrics import Metrics
from cake.api.openapi import openapi
from cake.api.origins import Origins
from cake.api.page_files import page_routes
from cake.api.requests import ChatRequest, CompletionRequest, Sampled
from cake.api.service import Delta, Service, Task
from cake.api.shapes import ChatShape, CompletionShape
from cake.cluster_view import ClusterView

T = TypeVar("T")
Shape = ChatShape | CompletionShape
DONE = "[DONE]"
CHAT = About("Answer a chat.", ChatCompletion, ChatChunk | LastChatChunk | ErrorAnswer, DONE)
SAME_CHAT = replace(CHAT, summary="The same as `/v1/chat/completions`.")
COMPLETION = About("Go on where a prompt ends.", Completion, CompletionChunk | Completion | ErrorAnswer, DONE)
METRICS = About("What Prometheus reads.", text="text/plain", group="Cluster")
ANYWHERE = Origins()
HEALTH = About("Whether the server is well.", Health, group="Cluster", needs_key=False)


def build_app(
    service: Service, view: ClusterView, api_key: str | None = None, origins: Origins = ANYWHERE
) -> Starlette:
    """All routes; with a key, who does not bring it is told only whether the server is well."""

    async def chat(request: Request) -> Response:
        body = ChatRequest.model_validate_json(await read_json(request))
        return await _answered(request, service, body, await service.chat(body), ChatShape(service.model))

    async def complete(request: Request) -> Response:
        body = CompletionRequest.model_validate_json(await read_json(request))
        task = service.completion(body)  # it knows which tokens there are, and so whether they are text
        shape = CompletionShape(service.model, service.text_of(body.prompt) if body.echo else "")
        return await _answered(request, service, body, task, shape)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(_model(service))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ready", "model": service.model})

    metrics = Metrics(view)
    endpoints = [
        Endpoint("/v1/chat/completions", chat, "POST", ChatRequest, CHAT),
        Endpoint("/api/v1/chat/completions", chat, "POST", ChatRequest, SAME_CHAT),
        Endpoint("/v1/completions", complete, "POST", CompletionRequest, COMPLETION),
        Endpoint("/v1/models", models, about=About("Which models are served.", ModelList)),
        Endpoint("/v1/models/{name:path}", model, about=About("One of them.", ModelCard, errors=(404,))),
        *cluster_endpoints(view),
        Endpoint("/metrics", metrics.answer, about=METRICS),
    ]
    well = Endpoint("/health", health, about=HEALTH)
    described = openapi([*endpoints, well], service.model, api_key is not None)

    def route(each: Endpoint) -> Route:
        handler = metrics.counted(each.path, _guarded(each.handler, api_key))
        return Route(each.path, handler, methods=[each.method])

    routes = [
        *map(route, endpoints),
        Route(well.path, well.handler),
        *page_routes(described),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Gate, origins)],
        exception_handlers={HTTPException: _no_such_route},
    )


def _guarded(handler: Handler, api_key: str | None) -> Handler:
    """The same, for those who know the key, with errors in OpenAI's shape."""

    async def guarded(request: Request) -> Response:
        try:
            if api_key is not None and not _knows(request, api_key):
                raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            return api_error(error).response

    return guarded


def _knows(request: Request, api_key: str) -> bool:
    given = request.headers.get("Authorization", "")
    return hmac.compare_digest(given.encode("latin-1"), f"Bearer {api_key}".encode())


async def _answered(request: Request, service: Service, body: Sampled, task: Task, shape: Shape) -> Response:
    if body.stream_options and not body.stream:
        raise ApiError(400, "stream_options is for streamed answers; set stream")
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(service, task, shape, usage)
        first = await anext(events)  # where there is no room, that is said instead of a stream
        return StreamingResponse(_begun(first, events), media_type=EVENTS)
    return JSONResponse(shape.whole(task, await _unless_gone(request, _whole(service, task))))


async def _whole(service: Service, task: Task) -> list[list[Delta]]:
    answers: list[list[Delta]] = [[] for _ in task.choices]
    with service.room():
        async with contextlib.aclosing(service.answers(task)) as parts:
            async for number, part in parts:
                answers[number].append(part)
    return answers


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work comes to; it ends when the client leaves. The request's body must have been read."""
    working = asyncio.create_task(work)
    leaving = asyncio.ensure_future(request.receive())  # nothing else can come now
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def _events(service: Service, task: Task, shape: Shape, usage: bool) -> AsyncGenerator[str, None]:
    """Server-sent events. A client that leaves ends the iteration, and so the answers."""
    with service.room():
        try:
            for number in range(task.n):
                yield event(shape.first(number))
            async with contextlib.aclosing(service.answers(task)) as parts:
                async for number, part in parts:
                    yield event(shape.part(number, part))
            for number in range(task.n):
                yield event(shape.last(number, task))
            if usage:
                yield event(shape.usage(task))
        except Exception as error:
            yield event(api_error(error).body)
        yield f"data: {DONE}\n\n"


async def _begun(first: str, events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with contextlib.aclosing(events):
        yield first
        async for each in events:
            yield each


def _model(service: Service) -> ModelCard:
    return {"id": service.model, "object": "model", "created": service.started, "owned_by": "cake"}


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = (
        f"{request.method} is not for {path}" if error.status_code == 405 else f"there is no {path} here"
    )
    response = ApiError(error.status_code, message).response
    response.headers.update(error.headers or {})  # which methods there are
    return response
