"""What all routes have in common: what answers a request, what is said of it, and how an event is sent."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from cake.api.answers import ErrorAnswer
from cake.api.errors import ErrorBody
from cake.api.json_body import read_json

Handler = Callable[[Request], Awaitable[Response]]
B = TypeVar("B", bound=BaseModel)

EVENTS = "text/event-stream"
LINES = "application/x-ndjson"


@dataclass(frozen=True)
class About:
    """What a route's description says to those who ask there; types are such as pydantic makes schemas of."""

    summary: str
    answer: Any = None  # the type of its JSON, where it can be JSON
    event: Any = None  # the type of each event's JSON, where it can be a stream of them
    last_event: str | None = None  # what ends the stream, where something does
    line: Any = None  # the type of each line's JSON, where it can be a stream of lines
    text: str | None = None  # its media type, where it is text
    unready: Any = None  # the type of its JSON with status 503, where that is no error
    errors: tuple[int, ...] = ()  # statuses, beside those that follow from what it is
    error: Any = ErrorAnswer  # the type of what says an error
    group: str = "OpenAI"
    needs_key: bool = True


@dataclass(frozen=True)
class Endpoint:
    """A route: where it is, what answers there, and what a request to it must bring."""

    path: str
    handler: Handler
    method: str = "GET"
    body: type[BaseModel] | None = None  # read by the handler
    header: str | None = None  # only for requests that have it
    about: About | None = None  # none, if programs need not know of it


def _never(request: Request) -> bool:
    return False


@dataclass(frozen=True)
class Dialect:
    """How clients of one kind ask, and how they are told of errors."""

    endpoints: Sequence[Endpoint]
    error_body: ErrorBody
    is_spoken: Callable[[Request], bool] = _never  # by a request to a route that is not there


def posted(
    path: str, body: type[B], answer: Callable[[Request, B], Awaitable[Response]], about: About | None = None
) -> Endpoint:
    """An endpoint whose requests bring a body, which is checked before `answer` is given it."""

    async def handler(request: Request) -> Response:
        return await answer(request, body.model_validate_json(await read_json(request)))

    return Endpoint(path, handler, "POST", body, about=about)


def event(data: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
