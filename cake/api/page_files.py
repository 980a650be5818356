"""The page: files that a browser asks for, as they lie in the folder `page`.

Knows nothing of what they do.
"""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

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


def page_routes() -> list[BaseRoute]:
    """`/` and what it loads. They tell nothing of the cluster, so they need no key."""
    return [Route("/", _index), Mount("/page", StaticFiles(directory=FOLDER))]
