"""The HTTP application: the routes of every dialect over one service, and what the server shows of itself."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cake.api.cluster import cluster_endpoints
from cake.api.errors import ApiError
from cake.api.guard import guarded
from cake.api.handlers import Dialect, Endpoint
from cake.api.metrics import Metrics
from cake.api.openai.routes import openai_dialect
from cake.api.openai.shapes import error_body
from cake.api.page_files import page_routes
from cake.api.service import Service
from cake.cluster_view import ClusterView


def build_app(service: Service, view: ClusterView, api_key: str | None = None) -> Starlette:
    """All routes; with a key, who does not bring it is told only whether the server is well."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ready", "model": service.model})

    metrics = Metrics(view)
    own = Dialect([*cluster_endpoints(view), Endpoint("/metrics", metrics.answer)], error_body)

    def route(endpoint: Endpoint, dialect: Dialect) -> Route:
        handler = guarded(endpoint.handler, api_key, dialect.error_body)
        return Route(endpoint.path, metrics.counted(endpoint.path, handler), methods=[endpoint.method])

    routes = [
        *(route(endpoint, each) for each in (openai_dialect(service), own) for endpoint in each.endpoints),
        Route("/health", health),
        *page_routes(),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _no_such_route})


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = (
        f"{request.method} is not for {path}" if error.status_code == 405 else f"there is no {path} here"
    )
    return ApiError(error.status_code, message).response(error_body)
