"""Reaching a worker: a connection, tried for as long as patience lasts, and the handshake."""

import asyncio
import functools
import itertools
import logging
import os
import time
from dataclasses import dataclass

from cake.errors import ClusterKeyError, NodeError, ProtocolError
from cake.net.connection import DEAD_AFTER_S, Connection, ConnectionLostError, connect
from cake.net.keyed import KeyedConnection, new_connection
from cake.net.tls import Credentials
from cake.protocol.handshake import Expectation, check_welcome, hello, payload_limit
from cake.protocol.messages import Goodbye, Welcome
from cake.remote import RemoteWorker
from cake.topology import Node

log = logging.getLogger(__name__)
ATTEMPTS_IN_SILENCE = 3


@dataclass(frozen=True)
class Patience:
    """How long the master tries to reach a worker, in seconds; pauses double up to the longest."""

    total: float = 30.0
    first_pause: float = 0.1
    longest_pause: float = 4.0
    handshake: float = 10.0
    dead_after: float = DEAD_AFTER_S  # of silence, once it is reached
    aloud: bool = True  # say who is waited for


class UnreachableError(NodeError):
    """No worker listens there."""


class HungUpError(NodeError):
    """It hung up during the handshake and did not say why: it may be ending."""


async def connect_worker(
    node: Node, expected: Expectation, patience: Patience, credentials: Credentials | None = None
) -> RemoteWorker:
    """Reach a worker, shake hands, and check that it serves what the topology says.

    A worker that does not listen yet is tried again until patience ends, so that the order of
    starting does not matter. Raises `NodeError`.
    """
    connection = await _connect(node, patience, credentials)
    try:
        if isinstance(connection, KeyedConnection):
            await asyncio.wait_for(connection.prove_as_master(node.name), patience.handshake)
        started = time.perf_counter()
        welcome = await asyncio.wait_for(_greet(connection, node), patience.handshake)
        round_trip_s = time.perf_counter() - started
        check_welcome(welcome, expected, node.address)
    except BaseException as error:
        connection.abort()
        reason = _handshake_failure(error)
        if reason is None:
            raise
        kind = HungUpError if isinstance(error, ConnectionLostError) else NodeError
        raise kind(f"worker {node.name!r} at {node.address} {reason}") from error
    connection.raise_limits(payload_limit(welcome.max_batch_tokens, expected.hidden_size))
    connection.keep_alive(patience.dead_after)
    return RemoteWorker(node, connection, welcome, round_trip_s)


def _handshake_failure(error: BaseException) -> str | None:
    """What a person should hear of an error during the handshake; none if it says so itself."""
    if isinstance(error, asyncio.TimeoutError):
        return "accepts connections but does not answer; is it a Cake worker, and is it well?"
    if isinstance(error, ClusterKeyError):
        return str(error)
    if isinstance(error, ProtocolError):
        return f"does not speak Cake's protocol: {error}; is its host right in the topology?"
    if isinstance(error, ConnectionLostError):
        return f"hung up during the handshake: {error}; its log says why"
    return None


async def _greet(connection: Connection, node: Node) -> Welcome:
    if not connection.over:  # a worker may refuse whoever comes from here before it is greeted
        await connection.send(hello(node.name))
    message = (await connection.receive()).message
    if isinstance(message, Goodbye):
        raise NodeError(f"worker {node.name!r} at {node.address} refused: {message.reason}")
    assert isinstance(message, Welcome)  # the table of states allows no other
    return message


async def _connect(node: Node, patience: Patience, credentials: Credentials | None) -> Connection:
    """Try with growing pauses until a connection opens; `NodeError` when patience ends."""
    deadline = time.monotonic() + patience.total
    pause, reason = patience.first_pause, "no answer"
    new = functools.partial(new_connection, credentials=credentials)
    for attempt in itertools.count():
        try:
            opening = connect(node.host, node.port, new)
            return await asyncio.wait_for(opening, max(deadline - time.monotonic(), 0.01))
        except asyncio.TimeoutError:
            reason = "no answer"
        except UnicodeError as error:
            raise NodeError(
                f"worker {node.name!r} cannot be reached: {node.host!r} is not a host's name; mend it in "
                "the topology"
            ) from error
        except OSError as error:
            reason = _reason(error)
        if deadline - time.monotonic() < pause:
            break
        if attempt == ATTEMPTS_IN_SILENCE and patience.aloud:
            log.warning("waiting for worker %r at %s (%s)", node.name, node.address, reason)
        await asyncio.sleep(pause)
        pause = min(2 * pause, patience.longest_pause)
    raise UnreachableError(
        f"worker {node.name!r} at {node.address} cannot be reached ({reason}); start it with "
        f"'cake-cli --mode worker --name {node.name} ...' or mend its host in the topology"
    )


def _reason(error: OSError) -> str:
    """The system's words; asyncio puts its own in their place, and Windows has none for sockets."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if os.name == "posix" and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error)
