"""Answers sent to a client, whole or as a stream, in whatever shape; they end when the client leaves."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cake.api.errors import ApiError, api_error
from cake.api.service import Service
from cake.api.task import Delta, Task
from cake.tasks import end

T = TypeVar("T")
QUIET_S = 5.0  # after which a stream begins without a token: clients give up who hear nothing for long


class Shape(Protocol):
    """How a dialect writes answers. What a stream has to say at some point may be nothing."""

    media_type: str  # of streams

    def whole(self, task: Task, answers: Sequence[Sequence[Delta]]) -> Mapping[str, Any]:
        """The answers as one object."""

    def begin(self, task: Task) -> str:
        """What a stream begins with."""

    def part(self, number: int, part: Delta) -> str:
        """A piece of an answer."""

    def end(self, task: Task) -> str:
        """What comes when all answers have ended."""

    def failed(self, error: ApiError) -> str:
        """What comes instead of it after an error."""


async def answered(request: Request, service: Service, task: Task, shape: Shape, stream: bool) -> Response:
    """The response to a request whose body has been read and understood."""
    if stream:
        pieces = _pieces(service, task, shape)
        first = await _unless_gone(request, anext(pieces))  # or why there is none, instead of a stream
        return StreamingResponse(_begun(first, pieces), media_type=shape.media_type)
    return JSONResponse(shape.whole(task, await _unless_gone(request, _whole(service, task))))


async def _whole(service: Service, task: Task) -> list[list[Delta]]:
    answers: list[list[Delta]] = [[] for _ in task.choices]
    with service.room():
        async with contextlib.aclosing(service.answers(task)) as parts:
            async for number, part in parts:
                answers[number].append(part)
    return answers


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What the work comes to; it ends when the client leaves. The request's body must have been read."""
    working = asyncio.ensure_future(work)
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


async def _pieces(service: Service, task: Task, shape: Shape) -> AsyncGenerator[str, None]:
    """What is sent, beginning when there is a token, or when none has come for a while.

    An error before that is raised, as it can still be told as a status. A client that leaves ends the
    iteration, and so the answers.
    """
    with service.room():
        async with contextlib.aclosing(service.answers(task)) as parts:
            coming = asyncio.ensure_future(anext(parts, None))
            try:
                await asyncio.wait({coming}, timeout=QUIET_S)
                if coming.done():
                    coming.result()
                yield shape.begin(task)
                try:
                    numbered = await coming
                    while numbered is not None:
                        yield shape.part(*numbered)
                        numbered = await anext(parts, None)
                    yield shape.end(task)
                except Exception as error:
                    yield shape.failed(api_error(error))
            finally:
                await end([coming])


async def _begun(first: str, pieces: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with contextlib.aclosing(pieces):
        yield first
        async for each in pieces:
            yield each
