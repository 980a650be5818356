"""Whether the server is well: for whoever watches it, starts it again, or sends clients elsewhere.

Asks for no key, so it tells strangers nothing of who serves what.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cake.api.errors import RETRY_AFTER_S
from cake.cluster_view import ClusterView


def health_routes(view: ClusterView, model: str) -> list[Route]:
    """`/health` says all; `/health/live` is 200 while anybody answers, `/health/ready` as `/health`."""

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        status = view.condition
        ready = status in ("ready", "degraded")
        told = {"status": status, "live": True, "ready": ready, "model": model}
        return JSONResponse(told) if ready else JSONResponse(told, 503, {"Retry-After": str(RETRY_AFTER_S)})

    paths = {"/health": ready, "/health/ready": ready, "/health/live": live}
    return [Route(path, handler) for path, handler in paths.items()]
