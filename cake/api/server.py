"""Serving an application over HTTP until someone ends it."""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from cake.api.connection import KEEP_ALIVE_S, ClientConnection
from cake.api.errors import ApiError
from cake.api.gate import refusing
from cake.api.origins import Names
from cake.errors import CakeError
from cake.topology import format_address, parse_address

log = logging.getLogger(__name__)
DRAIN_S = 30.0  # for what is being answered when the server is told to end
LAST_BYTES_S = 5  # for clients to take the ends of their answers

LEAVING = ApiError(503, "this server is about to end; ask again when it is back", "leaving", "server_error")


class Door:
    """Lets requests in until it is shut; who asks for an answer then is told to come back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._refusal, self.shut = app, refusing(app, LEAVING), False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        refuses = self.shut and scope["method"] == "POST"
        await (self._refusal if refuses else self._app)(scope, receive, send)


class _Server(uvicorn.Server):
    """Leaves Ctrl-C to whoever runs the event loop, and ends after a SIGTERM when all is answered."""

    def __init__(self, config: uvicorn.Config, door: Door, on_leave: Callable[[], object]) -> None:
        super().__init__(config)
        self._door, self._on_leave = door, on_leave
        self._late_s = math.inf  # on the event loop's clock: when what is not answered yet is given up

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with contextlib.suppress(NotImplementedError):  # Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._leave)
        yield

    def _leave(self) -> None:
        """Take no new requests, and end when all are answered; when told again, at once."""
        now = asyncio.get_running_loop().time()
        self._late_s = now if self._door.shut else now + DRAIN_S
        self._door.shut = True
        self._on_leave()

    @property
    def _late(self) -> bool:
        return asyncio.get_running_loop().time() >= self._late_s

    async def on_tick(self, counter: int) -> bool:
        """Whether to end."""
        answered = self._door.shut and not self.server_state.tasks
        return await super().on_tick(counter) or answered or self._late

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections."""
        if self._late:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        await super().shutdown(sockets)

    async def give_up(self) -> None:
        """End at once: whoever still answers learns that his client is gone, and is not cut off amid it."""
        self._late_s = -math.inf
        if self.started:
            await self.shutdown()


def listen_at(address: str) -> socket.socket:
    """A socket that listens at `host:port`. Raises `CakeError` where that cannot be."""
    try:
        host, port = parse_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except ValueError as error:
        raise CakeError(f"--api {address}: cannot listen there: {error}") from error
    except (OSError, OverflowError) as error:
        raise CakeError(_why_not_at(address, error)) from error


def _why_not_at(address: str, error: Exception) -> str:
    """Why nothing can listen there, for a person."""
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"--api {address} is in use; stop the other program or choose another port"
    reason = getattr(error, "strerror", None) or "not a host's name"
    return f"--api {address} cannot be used: {reason}; choose an address of this machine"


def url_of(listening: socket.socket) -> str:
    """Where clients find it."""
    host, port = listening.getsockname()[:2]
    return f"http://{format_address(host, port)}"


def is_private(listening: socket.socket) -> bool:
    """Whether this machine alone reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def warn_of_strangers(listening: socket.socket, api_key: str | None) -> None:
    """Say so where others than this machine may come in without a key."""
    if api_key is None and not is_private(listening):
        log.warning("whoever reaches this address may use the model: set --api-key, or listen on 127.0.0.1")


def names_of(listening: socket.socket, api_key: str | None) -> Names:
    """By which names it may be asked. Who knows the key may use any: a stranger's page does not know it."""
    if api_key is not None:
        return "any"
    return "machine" if is_private(listening) else "network"


async def serve(app: ASGIApp, listening: socket.socket, on_leave: Callable[[], object]) -> None:
    """Answer requests until SIGTERM, or until cancelled.

    `on_leave` ends what would never end by itself, so that nobody waits for it.
    """
    door = Door(app)
    config = uvicorn.Config(
        door,
        http=ClientConnection,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_BYTES_S,
    )
    server = _Server(config, door, on_leave)
    try:
        await server.serve([listening])
    except asyncio.CancelledError:
        await server.give_up()
        raise
