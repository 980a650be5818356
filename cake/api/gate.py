"""The gate before all routes: who is turned away for what a browser says of him, or because there is no room,
and what browsers are told.

https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cake.api.errors import ApiError
from cake.api.origins import ANY, Origins

Refusal = Callable[[Request, ApiError], Response]  # what tells a client of it, in the client's dialect
REMEMBER_S = 600
REFUSED = "cake.refused"  # in a request's scope: the error with which it is turned away


def refusing(app: ASGIApp, error: ApiError) -> ASGIApp:
    """An application that has a gate, but turning everybody away."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, REFUSED: error}, receive, send)

    return refuse


class Gate:
    """An application before another one."""

    def __init__(self, app: ASGIApp, origins: Origins, refusal: Refusal) -> None:
        self._app, self._origins, self._refusal = app, origins, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application do so."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("Origin", "").lower()
        told = self._told(origin)

        async def send_told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(told)
            await send(message)

        refused = scope.get(REFUSED) or self._refused(headers.get("Host", "").lower(), origin)
        if refused is not None:
            await self._refusal(Request(scope), refused)(scope, receive, send_told)
        elif scope["method"] == "OPTIONS" and "Access-Control-Request-Method" in headers:
            await self._allowed(headers)(scope, receive, send_told)
        else:
            await self._app(scope, receive, send_told)

    def _refused(self, host: str, origin: str) -> ApiError | None:
        """What is told to who may not ask. Programs say no origin, and old ones no host."""
        if host and not self._origins.answer_to(host):
            return ApiError(
                421,
                f"this server does not answer to {host!r}: ask for it by its address, or start it with "
                f"--api-key, or with --api-origin http://{host}",
                "unknown_host",
            )
        if origin and not self._origins.may_ask(origin, host):
            return ApiError(
                403,
                "pages of other origins may not ask here, unless --api-origin names theirs",
                "foreign_origin",
            )
        return None

    def _told(self, origin: str) -> dict[str, str]:
        """What lets a page read the answer, and keeps caches from giving it to other pages."""
        if not origin or not self._origins.allow(origin):
            return {"Vary": "Origin"}
        allowed = ANY if ANY in self._origins.allowed else origin
        return {
            "Vary": "Origin",
            "Access-Control-Allow-Origin": allowed,
            "Access-Control-Expose-Headers": "*",
        }

    def _allowed(self, headers: Headers) -> Response:
        """The answer to whether a page may ask in this way: whoever may ask at all may ask as he likes."""
        asked = {"Methods": headers["Access-Control-Request-Method"]}
        if "Access-Control-Request-Headers" in headers:
            asked["Headers"] = headers["Access-Control-Request-Headers"]
        told = {f"Access-Control-Allow-{what}": value for what, value in asked.items()}
        return Response(status_code=204, headers={**told, "Access-Control-Max-Age": str(REMEMBER_S)})
