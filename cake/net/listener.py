"""A worker's address: taken early, listened on when there is something to serve."""

import asyncio
import errno
import os
import socket
from collections.abc import Callable

from cake.errors import NodeError
from cake.net.connection import Connection
from cake.net.keyed import new_connection
from cake.net.tls import Credentials

AT_ONCE = 8  # accepted before others are read: few enough that none is dropped unheard
QUEUE = 1024  # that the system may hold meanwhile; whom it turns away, TCP lets try again after a second


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; `NodeError` when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _address_error(host, port, error) from error
    try:
        if os.name == "posix":  # elsewhere the option means something else
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _address_error(host, port, error) from error
    return listener


def _address_error(host: str, port: int, error: Exception) -> NodeError:
    """Why a worker cannot listen at its address, for a person."""
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return NodeError(f"--address {host}:{port} is in use; stop the other program or choose another port")
    reason = getattr(error, "strerror", None) or "not a host's name"
    return NodeError(f"--address {host}:{port} cannot be used: {reason}; choose one of this machine")


async def listen(
    listener: socket.socket,
    on_open: Callable[[Connection], None],
    credentials: Credentials | None = None,
) -> asyncio.Server:
    """Accept as a worker on a bound socket; `on_open` gets each new connection, keyed with credentials.

    Raises `NodeError` if another program listens there by now.
    """
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(
            lambda: new_connection("worker", credentials, on_open), sock=listener, backlog=AT_ONCE
        )
        listener.listen(QUEUE)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _address_error(host, port, error) from error
    return server
