"""What a worker does with a master's forwards: compute, and hand results to the next stage, or back.

Knows the sessions of one master. A small forward that comes while nothing else is computed is answered
where it arrives, in the event loop: the way to the device's thread and back takes longer than all else
that a worker does for a token, computing aside.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping

from cake.errors import CakeError, ProtocolError, SessionLostError
from cake.links import Links
from cake.model.batch import Segment
from cake.net.connection import Connection, ConnectionLostError
from cake.protocol.frames import Frame
from cake.protocol.handshake import MAX_BATCH_TOKENS
from cake.protocol.messages import Failed, Forward, Lost, Message, Result, StageReport, WireSegment
from cake.stage import Answered, WireStage

log = logging.getLogger(__name__)

MAX_SESSIONS = 1024  # of one master; each holds at most the context's tokens


class Work:
    """That for one master, who is at the other end of `connection`; its `number` tells it from others."""

    def __init__(
        self,
        number: int,
        stages: Mapping[int, WireStage],
        hidden_size: int,
        links: Links,
        connection: Connection,
    ) -> None:
        """`stages` by their first block; over `links` results go on."""
        self._number, self._stages, self._hidden_size = number, stages, hidden_size
        self._links, self._connection = links, connection
        self._sessions: set[int] = set()
        self.begun = self.ended = 0  # forwards

    async def forward(self, message: Forward, frame: Frame) -> None:
        """Compute, and hand the result on. Raises `ProtocolError` where the message makes no sense."""
        with self._counted():
            stage, segments = self._read(message)
            try:
                self._hold(message.segments)
                answered = await stage.answer(message.hidden, segments, frame.arrived_s)
                answer = _answer(message, frame, answered)
            except Exception as error:
                answer = _failure(message, error)
            to = self._recipient(message, answer)
            if to is not None:
                with contextlib.suppress(ConnectionLostError, ProtocolError):  # as its end will tell
                    await to.send(answer)

    def forward_at_once(self, message: Forward, frame: Frame) -> bool:
        """The same, waiting for nothing; or nothing, and False, where something has to be waited for."""
        if self.begun > self.ended:  # what came before must go on before
            return False
        stage = self._stages.get(message.first)
        if stage is None or not stage.is_quick(sum(wire.length for wire in message.segments)):
            return False
        following = self._next(message) if message.route else self._connection
        if following is None or not (following.free and self._connection.free):
            return False
        with self._counted():
            stage, segments = self._read(message)
            try:
                self._hold(message.segments)
                answered = stage.answer_at_once(message.hidden, segments, frame.arrived_s)
                answer = _answer(message, frame, answered)
            except Exception as error:
                answer = _failure(message, error)
            to = self._recipient(message, answer)
            if to is not None:
                to.post(answer)
        return True

    async def forget(self, sessions: Iterable[int] | None = None) -> None:
        """Free these of the master's sessions; all, if none are named."""
        some = self._sessions if sessions is None else self._sessions.intersection(sessions)
        keys = [(self._number, session) for session in some]
        for stage in self._stages.values():
            await stage.forget(keys)
        self._sessions = self._sessions.difference(some)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self.begun += 1
        try:
            yield
        finally:
            self.ended += 1

    def _hold(self, segments: Iterable[WireSegment]) -> None:
        new = [wire.session for wire in segments if wire.session not in self._sessions]
        if len(self._sessions) + len(new) > MAX_SESSIONS:
            raise CakeError(f"more than {MAX_SESSIONS} sessions; forget some first")
        self._sessions.update(new)

    def _next(self, message: Forward) -> Connection | None:
        return self._links.standing(message.route[0].link) if message.route else None

    def _recipient(self, message: Forward, answer: Message) -> Connection | None:
        """None where it is gone: then the master knows, or is gone itself."""
        to = self._next(message) if isinstance(answer, Forward) else self._connection
        return None if to is None or to.over else to

    def _read(self, message: Forward) -> tuple[WireStage, tuple[Segment, ...]]:
        """The stage and the segments that are meant; `ProtocolError` where they make no sense."""
        stage = self._stages.get(message.first)
        if stage is None:
            raise ProtocolError(f"no span here begins at block {message.first}")
        if message.route and not self._links.known(message.route[0].link):
            raise ProtocolError(f"there is no link {message.route[0].link} here")
        segments = {wire.session: self._segment(wire) for wire in message.segments}
        n_tokens, hidden_size = sum(s.length for s in segments.values()), self._hidden_size
        if len(segments) < len(message.segments):
            raise ProtocolError("two segments of a batch are of the same session")
        if not 0 < n_tokens <= MAX_BATCH_TOKENS:
            raise ProtocolError(f"a batch has 1 to {MAX_BATCH_TOKENS} tokens, not {n_tokens}")
        if message.hidden.shape != (n_tokens, hidden_size):
            raise ProtocolError(
                f"hidden states of {list(message.hidden.shape)} do not fit {n_tokens} tokens of a model "
                f"of hidden size {hidden_size}"
            )
        return stage, tuple(segments.values())

    def _segment(self, wire: WireSegment) -> Segment:
        if not wire.length:
            raise ProtocolError(f"the segment of session {wire.session} is empty")
        source = None if wire.source == wire.session else (self._number, wire.source)
        return Segment((self._number, wire.session), wire.position, wire.length, source)


def _answer(message: Forward, frame: Frame, answered: Answered) -> Message:
    """To the next stage of its route, or to the master."""
    report = StageReport(answered.wait_s, answered.compute_s, answered.started_s, frame.n_bytes)
    reports = (*message.stages, report)
    if message.route:
        first, route = message.route[0].first, message.route[1:]
        return Forward(message.id, first, message.segments, route, reports, answered.hidden)
    return Result(message.id, reports, answered.hidden)


def _failure(message: Forward, error: Exception) -> Message:
    """What the master is told of it; raises what only a mistake here can be."""
    if isinstance(error, SessionLostError):
        assert isinstance(error.session, tuple)
        return Lost(message.id, error.session[1], error.held)
    if isinstance(error, CakeError):
        return Failed(message.id, str(error))
    if isinstance(error, (RuntimeError, MemoryError)):  # torch's, out of memory among them
        log.error("a forward failed", exc_info=error)
        return Failed(message.id, " ".join(str(error).split())[:500])
    raise error
