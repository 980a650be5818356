"""What all routes have in common: what answers a request, what is said of it, and how an event is sent."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from cake.api.answers import ErrorAnswer

Handler = Callable[[Request], Awaitable[Response]]
EVENTS = "text/event-stream"


@dataclass(frozen=True)
class About:
    """What a route's description says to those who ask there; types are such as pydantic makes schemas of."""

    summary: str
    answer: Any = None  # the type of its JSON, where it can be JSON
    event: Any = None  # the type of each event's JSON, where it can be a stream of them
    last_event: str | None = None  # what ends the stream, where something does
    text: str | None = None  # its media type, where it is text
    errors: tuple[int, ...] = ()  # statuses, beside those that follow from what it is
    error: Any = ErrorAnswer  # the type of what says an error
    group: str = "OpenAI"
    needs_key: bool = True


@dataclass(frozen=True)
class Endpoint:
    """A route: where it is, what answers there, what a request to it must bring, and what is said of it."""

    path: str
    handler: Handler
    method: str = "GET"
    body: type[BaseModel] | None = None  # read by the handler
    about: About | None = None  # none, if programs need not know of it


def event(data: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
