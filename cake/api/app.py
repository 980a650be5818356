"""The HTTP application: the routes of every dialect over one service, and what the server shows of itself."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from cake.api.anthropic.routes import anthropic_dialect
from cake.api.cluster import cluster_endpoints
from cake.api.errors import ApiError
from cake.api.gate import Gate
from cake.api.guard import guarded
from cake.api.handlers import About, Dialect, Endpoint, Handler
from cake.api.health import health_endpoints
from cake.api.metrics import Metrics
from cake.api.ollama.routes import ollama_dialect
from cake.api.openai.routes import openai_dialect
from cake.api.openai.shapes import error_body
from cake.api.openapi import openapi
from cake.api.origins import Origins
from cake.api.page_files import page_routes
from cake.api.service import Service
from cake.cluster_view import ClusterView

METRICS = About("What Prometheus reads.", text="text/plain", group="Cluster")
ANYWHERE = Origins()


def build_app(
    service: Service, view: ClusterView, api_key: str | None = None, origins: Origins = ANYWHERE
) -> Starlette:
    """All routes; with a key, who does not bring it is told only whether the server is well."""
    metrics = Metrics(view)
    own = Dialect([*cluster_endpoints(view), Endpoint("/metrics", metrics.answer, about=METRICS)], error_body)
    well = health_endpoints(view, service.model)
    dialects = [anthropic_dialect(service), openai_dialect(service), ollama_dialect(service), own]

    def route(endpoint: Endpoint, dialect: Dialect) -> Route:
        handler = guarded(endpoint.handler, api_key, dialect.error_body)
        counted = metrics.counted(endpoint.path, handler)
        return _HeaderRoute(endpoint.header, endpoint.path, counted, methods=[endpoint.method])

    def refusal(request: Request, error: ApiError) -> Response:
        spoken = next((dialect for dialect in dialects if _is_in(dialect, request)), own)
        return error.response(spoken.error_body)

    async def no_such_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = refusal(request, _no_such_route(request, error))
        response.headers.update(error.headers or {})  # which methods there are
        return response

    endpoints = [*(endpoint for dialect in dialects for endpoint in dialect.endpoints), *well]
    routes = [
        *(route(endpoint, dialect) for dialect in dialects for endpoint in dialect.endpoints),
        *(Route(endpoint.path, endpoint.handler) for endpoint in well),
        *page_routes(openapi(endpoints, service.model, api_key is not None)),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Gate, origins, refusal)],
        exception_handlers={HTTPException: no_such_route},
    )


class _HeaderRoute(Route):
    """One that is there only for requests with some header, where dialects have the same path."""

    def __init__(self, header: str | None, path: str, handler: Handler, methods: list[str]) -> None:
        super().__init__(path, handler, methods=methods)
        self._header = header

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if self._header is not None and self._header not in HTTPConnection(scope).headers:
            return Match.NONE, {}
        return super().matches(scope)


def _is_in(dialect: Dialect, request: Request) -> bool:
    has_path = any(each.path == request.url.path and each.header is None for each in dialect.endpoints)
    return has_path or dialect.is_spoken(request)


def _no_such_route(request: Request, error: HTTPException) -> ApiError:
    path = request.url.path
    message = (
        f"{request.method} is not for {path}" if error.status_code == 405 else f"there is no {path} here"
    )
    return ApiError(error.status_code, message)
