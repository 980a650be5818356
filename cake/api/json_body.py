"""The body of a request, as it comes: how large it may be, and what it may be called; and that it is JSON."""

from pydantic_core import from_json
from starlette.requests import Request

from cake.api.errors import ApiError

MOST_BODY_BYTES = 16 << 20
FORM = "application/x-www-form-urlencoded"  # what curl calls anything that it is not told the name of


async def read_json(request: Request) -> bytes:
    """The whole body. Raises `ApiError` where it is too large or no JSON."""
    kind = request.headers.get("Content-Type", FORM).partition(";")[0].strip().lower()
    if kind not in (FORM, "application/json") and not kind.endswith("+json"):
        raise ApiError(415, f"bodies are JSON here: send application/json, not {kind[:80] or 'this'}")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY_BYTES:
            raise ApiError(413, f"the request is larger than {MOST_BODY_BYTES >> 20} MiB")
    try:
        from_json(body, allow_inf_nan=False)  # which readers of models let pass where anything may stand
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error
    return bytes(body)
