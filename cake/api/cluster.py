"""Routes that show the cluster: a snapshot, and a stream of them."""

import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cake.api.errors import ApiError
from cake.api.handlers import EVENTS, Endpoint, event
from cake.cluster_view import ClusterView

MOST_STREAMS = 64  # of events


def cluster_endpoints(view: ClusterView) -> list[Endpoint]:
    """Of one view."""

    async def topology(request: Request) -> Response:
        return JSONResponse(view.snapshot())

    async def events(request: Request) -> Response:
        if view.streams >= MOST_STREAMS:
            raise ApiError(503, f"{MOST_STREAMS} clients watch already", "overloaded", "server_error")
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(view), media_type=EVENTS, headers=headers)

    return [Endpoint("/api/v1/topology", topology), Endpoint("/api/v1/events", events)]


async def _events(view: ClusterView) -> AsyncIterator[str]:
    async with contextlib.aclosing(view.events()) as snapshots:
        async for snapshot in snapshots:
            yield event(snapshot)
