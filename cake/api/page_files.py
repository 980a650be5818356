"""The page: files that a browser asks for, as they lie in the folder `page`.

Knows nothing of what they do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from cake.api.manual import manual_of

FOLDER = Path(__file__).parent / "page"
# Nothing from elsewhere is loaded or asked, and nobody may put the page into a frame of theirs.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def _index(request: Request) -> Response:
    return FileResponse(FOLDER / "index.html", headers=HEADERS)


async def _icon(request: Request) -> Response:
    return FileResponse(FOLDER / "cake.svg", headers=HEADERS)


def page_routes(described: Mapping[str, Any]) -> list[BaseRoute]:
    """`/` and what it loads, the icon that browsers ask for, and the API's description, for people too.

    They tell nothing of the cluster, so they need no key.
    """
    manual = manual_of(described)

    async def openapi(request: Request) -> Response:
        return JSONResponse(described)

    async def docs(request: Request) -> Response:
        return HTMLResponse(manual, headers=HEADERS)

    return [
        Route("/", _index),
        Route("/favicon.ico", _icon),
        Route("/openapi.json", openapi),
        Route("/docs", docs),
        Mount("/page", StaticFiles(directory=FOLDER)),
    ]
