"""Whether the server is well: for whoever watches it, starts it again, or sends clients elsewhere.

Asks for no key, so it tells strangers nothing of who serves what.
"""

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cake.api.answers import Alive, Health
from cake.api.errors import RETRY_AFTER_S
from cake.api.handlers import About, Endpoint
from cake.cluster_view import ClusterView

WELL = About("Whether the server is well.", Health, unready=Health, group="Cluster", needs_key=False)
READY = replace(WELL, summary="The same as `/health`.")
LIVE = About("Whether anybody answers.", Alive, group="Cluster", needs_key=False)


def health_endpoints(view: ClusterView, model: str) -> list[Endpoint]:
    """`/health` says all; `/health/live` is 200 while anybody answers, `/health/ready` as `/health`."""

    async def live(request: Request) -> Response:
        alive: Alive = {"live": True}
        return JSONResponse(alive)

    async def ready(request: Request) -> Response:
        status = view.condition
        ready = status in ("ready", "degraded")
        told: Health = {"status": status, "live": True, "ready": ready, "model": model}
        return JSONResponse(told) if ready else JSONResponse(told, 503, {"Retry-After": str(RETRY_AFTER_S)})

    return [
        Endpoint("/health", ready, about=WELL),
        Endpoint("/health/ready", ready, about=READY),
        Endpoint("/health/live", live, about=LIVE),
    ]
