"""A light HTTP client, whose own cost is small: one request after another over a connection.

Reads answers in chunks of server-sent events, as `cake-cli --api` streams them, and none other.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

DATA, DONE = b"data: ", b"[DONE]"


class RefusedError(Exception):
    """An answer of another status than 200."""


class HttpStream:
    """A connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        """What each event of the answer says, as it comes, but for the last one, `[DONE]`.

        Raises `RefusedError`, and `asyncio.IncompleteReadError` where the connection ends before the answer.
        """
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        self._writer.write(head.encode() + content)
        status, _, _ = (await self._reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
        if b" 200 " not in status:
            raise RefusedError(status.decode())
        rest = b""
        while chunk := await self._chunk():
            *whole, rest = (rest + chunk).split(b"\n\n")
            for event in whole:
                if event != DATA + DONE:
                    yield event.removeprefix(DATA)

    async def _chunk(self) -> bytes:
        size = int(await self._reader.readuntil(b"\r\n"), 16)
        return (await self._reader.readexactly(size + 2))[:size]


@contextlib.asynccontextmanager
async def http_stream(url: str) -> AsyncIterator[HttpStream]:
    """A connection to the server at `url`, closed in the end."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        yield HttpStream(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
