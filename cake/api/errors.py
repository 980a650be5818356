"""Errors that clients are told of: what they did, what is not there, what is too much at the moment.

How each is written is the business of a dialect.
"""

import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from cake.api.answers import Kind
from cake.errors import (
    CakeError,
    CheckpointError,
    NodeError,
    PromptTooLongError,
    ProtocolError,
    SessionLostError,
    SetupError,
    TopologyError,
)

log = logging.getLogger(__name__)
RETRY_AFTER_S = 5
OF_THE_SERVER = (SetupError, TopologyError, CheckpointError)


class ApiError(Exception):
    """An answer of another status than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        kind: Kind = "invalid_request_error",
        closes: bool = False,
    ) -> None:
        """With `closes` the connection ends with it."""
        super().__init__(message)
        self.status, self.code, self.kind, self.closes = status, code, kind, closes

    def response(self, error_body: "ErrorBody") -> JSONResponse:
        """The HTTP response that says it."""
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status == 503 else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.closes:
            headers["Connection"] = "close"
        return JSONResponse(error_body(self), self.status, headers)


ErrorBody = Callable[[ApiError], Mapping[str, Any]]  # the JSON object that says it in a dialect


def api_error(error: Exception) -> ApiError:
    """How a client is told of any error: what it did itself, what of the cluster fails at the moment (503).

    What no client can mend is logged, with an id that the client has too.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return ApiError(400, _what_is_wrong(error))
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), "context_length_exceeded")
    if isinstance(error, SessionLostError):  # again, with nobody beside it
        return ApiError(503, f"the memory for caches is short: {error}", "out_of_memory", "server_error")
    if isinstance(error, (NodeError, ProtocolError)):
        return ApiError(503, str(error), "worker_lost", "server_error")
    if isinstance(error, CakeError) and not isinstance(error, OF_THE_SERVER):
        return ApiError(400, str(error))
    number = secrets.token_hex(6)
    log.error("error %s", number, exc_info=error)
    words = str(error) if isinstance(error, CakeError) else "an error of the server's own"
    return ApiError(500, f"{words}; the server's log says more beside {number}", None, "server_error")


def _what_is_wrong(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where} is not supported"
    what = first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
