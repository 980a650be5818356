"""Who may ask: those who know the key."""

import hmac

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


def _knows(request: Request, api_key: str) -> bool:
    """Whether the key is there, in either of the headers in which clients bring it."""
    wanted = {"Authorization": f"Bearer {api_key}", "x-api-key": api_key}
    return any(_is_same(request.headers.get(name), value) for name, value in wanted.items())


def _is_same(given: str | None, wanted: str) -> bool:
    return given is not None and hmac.compare_digest(given.encode("latin-1"), wanted.encode())
