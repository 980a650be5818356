"""Who may ask: those who know the key, and no pages of other origins."""

import hmac
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cake.api.errors import ApiError, ErrorBody, api_error
from cake.api.handlers import Handler


def guarded(handler: Handler, api_key: str | None, error_body: ErrorBody) -> Handler:
    """The same, for those who may ask, with errors in a dialect's shape."""

    async def guarded(request: Request) -> Response:
        try:
            _check(request, api_key)
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            return api_error(error).response(error_body)

    return guarded


def _check(request: Request, api_key: str | None) -> None:
    """Raise `ApiError` unless whoever asks may."""
    if api_key is not None and not _knows(request, api_key):
        raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")
    if not _is_own(request):
        raise ApiError(403, "pages of other origins may not ask here", "foreign_origin")


def _is_own(request: Request) -> bool:
    """Whether no page asks, or the server's own: a browser says which page it is that makes it ask."""
    origin = request.headers.get("Origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("Host")


def _knows(request: Request, api_key: str) -> bool:
    """Whether the key is there, in either of the headers in which clients bring it."""
    wanted = {"Authorization": f"Bearer {api_key}", "x-api-key": api_key}
    return any(_is_same(request.headers.get(name), value) for name, value in wanted.items())


def _is_same(given: str | None, wanted: str) -> bool:
    return given is not None and hmac.compare_digest(given.encode("latin-1"), wanted.encode())
