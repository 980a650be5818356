"""Serving an application over HTTP until someone ends it."""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from cake.api.origins import Names
from cake.errors import CakeError
from cake.topology import format_address, parse_address

log = logging.getLogger(__name__)
DRAIN_S = 30


class _Server(uvicorn.Server):
    """Leaves Ctrl-C to whoever runs the event loop, and ends after a SIGTERM when all is answered."""

    def __init__(self, config: uvicorn.Config, on_leave: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_leave = on_leave

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        def leave() -> None:
            self.should_exit = True
            self._on_leave()

        with contextlib.suppress(NotImplementedError):  # Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leave)
        yield


def listen_at(address: str) -> socket.socket:
    """A socket that listens at `host:port`. Raises `CakeError` where that cannot be."""
    try:
        host, port = parse_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, ValueError, OverflowError) as error:
        raise CakeError(f"--api {address}: cannot listen there: {error}") from error


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


async def serve(app: Starlette, listening: socket.socket, on_leave: Callable[[], object]) -> None:
    """Answer requests until SIGTERM, or until cancelled.

    `on_leave` ends what would never end by itself, so that nobody waits for it.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=DRAIN_S
    )
    await _Server(config, on_leave).serve([listening])
