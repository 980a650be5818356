"""What all routes have in common: what answers a request, how its body is read, how an event is sent."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from cake.api.errors import ApiError, ErrorBody

Handler = Callable[[Request], Awaitable[Response]]
B = TypeVar("B", bound=BaseModel)

EVENTS = "text/event-stream"
MOST_BODY_BYTES = 16 << 20


@dataclass(frozen=True)
class Endpoint:
    """A route: where it is, what answers there, and what a request to it must bring."""

    path: str
    handler: Handler
    method: str = "GET"
    body: type[BaseModel] | None = None  # read by the handler
    header: str | None = None  # only for requests that have it


def _never(request: Request) -> bool:
    return False


@dataclass(frozen=True)
class Dialect:
    """How clients of one kind ask, and how they are told of errors."""

    endpoints: Sequence[Endpoint]
    error_body: ErrorBody
    is_spoken: Callable[[Request], bool] = _never  # by a request to a route that is not there


def posted(path: str, body: type[B], answer: Callable[[Request, B], Awaitable[Response]]) -> Endpoint:
    """An endpoint whose requests bring a body, which is checked before `answer` is given it."""

    async def handler(request: Request) -> Response:
        return await answer(request, body.model_validate_json(await _read(request)))

    return Endpoint(path, handler, "POST", body)


def event(data: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY_BYTES:
            raise ApiError(413, f"the request is larger than {MOST_BODY_BYTES >> 20} MiB")
    return bytes(body)
