"""The master's side of a worker: a connection, and a stage for each span at its other end."""

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from cake.errors import ClusterKeyError, NodeError, NodeLostError, ProtocolError, SessionLostError
from cake.net.connection import DEAD_AFTER_S, Connection, ConnectionLostError, connect
from cake.net.keyed import KeyedConnection, new_connection
from cake.net.tls import Credentials
from cake.protocol.frames import Frame
from cake.protocol.handshake import Expectation, check_welcome, hello, payload_limit
from cake.protocol.messages import (
    Failed,
    Forget,
    Forward,
    Goodbye,
    Leaving,
    Link,
    Linked,
    Lost,
    Memory,
    Message,
    Result,
    Unlinked,
    Welcome,
)
from cake.stage_stats import StageStats
from cake.topology import Node

log = logging.getLogger(__name__)
ATTEMPTS_IN_SILENCE = 3
NUMBERS = itertools.count()  # of questions to any worker: one may be answered by another


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


class RemoteWorker:
    """A worker that has said welcome. Matches answers to the questions they belong to.

    `on_lost` is called once, when it is gone.
    """

    def __init__(
        self, node: Node, connection: Connection, welcome: Welcome, round_trip_s: float = 0.0
    ) -> None:
        self.node, self.welcome = node, welcome
        self.clock_offset = time.perf_counter() - round_trip_s / 2 - welcome.clock
        self.round_trip_s = round_trip_s  # of the handshake
        self._connection = connection
        self.links: dict[int, str] = {}  # to other workers, by their names
        self.on_lost: Callable[[NodeLostError], object] = lambda _: None
        self._waiting: dict[int, asyncio.Future[Frame]] = {}
        self._failure: NodeLostError | None = None
        self.leaving = False  # it has said so, and still answers
        connection.hand_over(self._settle, self._on_end)

    @property
    def alive(self) -> bool:
        """Whether it is still there."""
        return self._failure is None

    @property
    def memory(self) -> Memory:
        """What it uses and has where it computes, as it said last; 0 as long as it has not."""
        return self._connection.peer_memory

    @property
    def idle(self) -> bool:
        """Whether no answer is due."""
        return not self._waiting

    async def ask(self, message: Forward | Link, others: "Sequence[RemoteWorker]" = ()) -> tuple[Frame, int]:
        """The answer to a message, and the bytes that the message took.

        It may come from any of `others` too, to whom the work is handed on. Raises what they answer:
        `SessionLostError`, or `NodeError`; `NodeLostError` where one of them, or a link, is lost.
        """
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        workers = [self, *others]
        for worker in workers:
            if worker._failure is not None:
                raise worker._failure
        for worker in workers:
            worker._waiting[message.id] = answer
        try:
            n_sent = await self._send(message)
            return await answer, n_sent
        finally:
            for worker in workers:
                worker._waiting.pop(message.id, None)
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # where sending failed, nobody else looks at it

    async def link(self, to: "RemoteWorker") -> int:
        """Let this worker connect to another; the link's number. Raises `NodeError` with the reason."""
        number, node = next(NUMBERS), to.node
        await self.ask(Link(number, node.name, node.host, node.port, to.welcome.visit))
        self.links[number] = node.name
        return number

    async def forget(self, sessions: Iterable[Hashable]) -> None:
        """Tell the worker that these sessions are over; a worker that is gone knows already."""
        if self._failure is None:
            with contextlib.suppress(NodeError):
                await self._send(Forget(tuple(number_of(s) for s in sessions)))

    async def close(self) -> None:
        """Say goodbye; who still waits for an answer gets an error."""
        reason = "the master is done" if self._failure is None else None
        self._fail("the master closed the connection")
        await self._connection.close(reason)

    async def _send(self, message: Message) -> int:
        try:
            return await self._connection.send(message)
        except ConnectionLostError as error:
            raise self._fail(f"went away in mid-sentence: {error}") from error

    def _on_end(self, error: Exception) -> None:
        self._fail(str(error))
        self._connection.abort()

    def _settle(self, frame: Frame) -> None:
        message = frame.message
        if isinstance(message, Unlinked):
            self._unlink(message)
            return
        if isinstance(message, Leaving):
            log.warning("%s will stop soon", self._who)
            self.leaving = True
            return
        if isinstance(message, Goodbye):
            self._on_end(NodeLostError(f"it said goodbye: {message.reason}"))
            return
        assert isinstance(message, Result | Lost | Failed | Linked)  # the table of states allows no other
        future = self._waiting.get(message.id)
        if future is None or future.done():
            return  # the one who asked has gone
        if isinstance(message, Lost):
            future.set_exception(SessionLostError(message.session, message.held))
        elif isinstance(message, Failed):
            future.set_exception(NodeError(f"{self._who} failed: {message.reason}"))
        else:
            future.set_result(frame)

    def _unlink(self, message: Unlinked) -> None:
        """What was on its way over the link comes no more; which of the questions that was is not known."""
        peer = self.links.pop(message.id, None)
        if peer is not None:
            self._refuse(NodeLostError(f"{self._who} lost its way to {peer!r}: {message.reason}"))

    def _fail(self, reason: str) -> NodeLostError:
        if self._failure is None:
            self._failure = NodeLostError(f"lost {self._who}: {reason}")
            self._refuse(self._failure)
            self.on_lost(self._failure)
        return self._failure

    def _refuse(self, error: NodeLostError) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    @property
    def _who(self) -> str:
        return f"worker {self.node.name!r} at {self.node.address}"


class RemoteStage:
    """One span of a worker, as a stage of the master's pipeline."""

    def __init__(self, worker: RemoteWorker, blocks: range, stats: StageStats | None = None) -> None:
        """With `stats` it goes on where an earlier connection to the same node ended."""
        self.node, self.blocks, self.worker = worker.node.name, blocks, worker
        self.device, self.dtype = worker.welcome.device, worker.welcome.dtype
        self.weights = worker.welcome.weights
        self.stats = stats or StageStats()

    async def forget(self, sessions: Iterable[Hashable]) -> None:
        """Free the sessions over there."""
        await self.worker.forget(sessions)


def number_of(session: Hashable) -> int:
    """A session's number on the wire."""
    if not isinstance(session, int):
        raise TypeError(f"sessions have whole numbers on the wire, not {session!r}")
    return session


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
