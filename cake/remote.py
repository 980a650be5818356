"""The master's side of a worker: a connection, and a stage for each span at its other end."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence

from cake.errors import NodeError, NodeLostError, SessionLostError
from cake.net.connection import Connection, ConnectionLostError
from cake.protocol.frames import Frame
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
NUMBERS = itertools.count()  # of questions to any worker: one may be answered by another


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
