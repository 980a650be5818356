"""Routes that show the cluster: a snapshot, and a stream of them."""

import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cake.api.errors import ApiError
from cake.api.handlers import EVENTS, About, Endpoint, event
from cake.cluster_view import ClusterView
from cake.snapshot import Snapshot

NOW = About("Who is there, and what the last second brought.", Snapshot, group="Cluster")
ALWAYS = About(
    "The same twice a second, and whenever something happens.",
    event=Snapshot,
    errors=(503,),
    group="Cluster",
)
MOST_STREAMS = 64  # of events


def cluster_endpoints(view: ClusterView) -> list[Endpoint]:
    """Where they are."""

    async def topology(request: Request) -> Response:
        return JSONResponse(view.snapshot())

    async def events(request: Request) -> Response:
        if view.streams >= MOST_STREAMS:
            raise ApiError(503, f"{MOST_STREAMS} clients watch already", "overloaded", "server_error")
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        if request.method == "HEAD":  # which would otherwise wait for the end
            return Response(media_type=EVENTS, headers=headers)
        return StreamingResponse(_events(view), media_type=EVENTS, headers=headers)

    return [
        Endpoint("/api/v1/topology", topology, about=NOW),
        Endpoint("/api/v1/events", events, about=ALWAYS),
    ]


async def _events(view: ClusterView) -> AsyncIterator[str]:
    async with contextlib.aclosing(view.events()) as snapshots:
        async for snapshot in snapshots:
            yield event(snapshot)
