"""A worker: listen, shake hands, and serve its stages to any number of masters at once.

Each connection has sessions of its own; what a master sends can end its own connection, and no
other. Torch runs in the device's thread, so the event loop always answers.
"""

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cake.device import StoppedError
from cake.errors import CakeError, ProtocolError, SessionLostError
from cake.model.batch import Segment
from cake.net.connection import Connection, ConnectionLostError
from cake.net.listener import listen
from cake.protocol.handshake import (
    MAX_BATCH_TOKENS,
    SOFTWARE,
    check_hello,
    payload_limit,
    span_infos,
)
from cake.protocol.messages import (
    VERSION,
    Failed,
    Forget,
    Forward,
    Goodbye,
    Hello,
    Lost,
    Message,
    Result,
    Welcome,
)
from cake.stage import WireStage
from cake.text import human_bytes

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0
REPORT_EVERY_S = 5.0


@dataclass(frozen=True)
class Service:
    """What a worker offers: its stages by their first block, and the words of its welcome."""

    node: str
    model: str
    hidden_size: int
    context: int
    stages: Mapping[int, WireStage]
    fingerprints: Sequence[str]

    def welcome(self) -> Welcome:
        """The answer to a good hello."""
        stage = next(iter(self.stages.values()))
        spans = [s.blocks for s in self.stages.values()]
        return Welcome(
            version=VERSION,
            software=SOFTWARE,
            node=self.node,
            model=self.model,
            spans=span_infos(spans, self.fingerprints),
            device=stage.device,
            dtype=stage.dtype,
            weights=stage.weights,
            context=self.context,
            max_batch_tokens=MAX_BATCH_TOKENS,
        )


class Worker:
    """Accepts masters and serves them; `close` ends all that it began."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._visits: dict[asyncio.Task[None], Visit] = {}
        self._numbers = itertools.count(1)
        self._server: asyncio.Server | None = None
        self._reporter: asyncio.Task[None] | None = None
        self.bytes_read = 0
        self.bytes_written = 0

    async def start(self, listener: socket.socket) -> None:
        """Begin to accept on a bound socket."""
        self._server = await listen(listener, self._accept)
        self._reporter = asyncio.create_task(self._report())

    async def close(self, reason: str) -> None:
        """Accept no more, and tell the masters why."""
        if self._server is not None:
            self._server.close()
        if self._reporter is not None:
            self._reporter.cancel()
        visits = dict(self._visits)
        for task in visits:
            task.cancel()
        await asyncio.gather(*visits, return_exceptions=True)
        await asyncio.gather(*(visit.connection.close(reason) for visit in visits.values()))

    def _accept(self, connection: Connection) -> None:
        visit = Visit(self._service, connection, next(self._numbers))
        self._visits[asyncio.create_task(self._serve(visit))] = visit

    async def _serve(self, visit: "Visit") -> None:
        try:
            await visit.run()
        except asyncio.CancelledError:
            return  # `close` says goodbye
        except Exception:  # one master's misfortune must not become the others'
            log.exception("serving %s failed", visit.connection.peer_address)
            visit.connection.abort()
        else:
            await visit.connection.close(visit.parting_words)
        finally:
            task = asyncio.current_task()
            assert task is not None
            del self._visits[task]
            self.bytes_read += visit.connection.bytes_received
            self.bytes_written += visit.connection.bytes_sent

    def _traffic(self) -> tuple[int, int]:
        open_connections = [visit.connection for visit in self._visits.values()]
        return (
            self.bytes_read + sum(c.bytes_received for c in open_connections),
            self.bytes_written + sum(c.bytes_sent for c in open_connections),
        )

    async def _report(self) -> None:
        """Every few seconds in which there was work: operations and traffic per second."""
        stages = self._service.stages.values()
        before, moment = (0, 0, 0, 0), time.monotonic()
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            operations = sum(stage.stats.messages for stage in stages)
            tokens = sum(stage.stats.tokens for stage in stages)
            now, after = time.monotonic(), (operations, tokens, *self._traffic())
            rates = [(b - a) / (now - moment) for a, b in zip(before, after, strict=True)]
            if operations > before[0]:
                log.info(
                    "%.1f operations/s, %.1f tokens/s, read %s/s, write %s/s",
                    *rates[:2],
                    human_bytes(rates[2]),
                    human_bytes(rates[3]),
                )
            before, moment = after, now


class Visit:
    """One master's connection, from handshake to parting."""

    def __init__(self, service: Service, connection: Connection, number: int) -> None:
        self.connection = connection
        self.parting_words: str | None = None
        self._service, self._number = service, number
        self._sessions: set[int] = set()

    async def run(self) -> None:
        """Serve until the master leaves or says something wrong; frees its sessions at the end."""
        who = self.connection.peer_address
        try:
            await asyncio.wait_for(self._shake_hands(), HANDSHAKE_S)
        except (asyncio.TimeoutError, ProtocolError) as error:
            self.parting_words = str(error) or f"no hello within {HANDSHAKE_S:g} s"
            log.warning("%s turned away: %s", who, self.parting_words)
            return
        except ConnectionLostError as error:
            log.debug("no handshake: %s", error)
            return
        log.info("master %s came", who)
        try:
            await self._serve()
        except ProtocolError as error:
            self.parting_words = str(error)
            log.warning("master %s dropped: %s", who, error)
        except ConnectionLostError as error:
            log.info("master %s left: %s", who, error)
        finally:
            with contextlib.suppress(StoppedError):  # a worker that ends frees everything anyway
                await self._forget(self._sessions)

    async def _shake_hands(self) -> None:
        message = (await self.connection.receive()).message
        assert isinstance(message, Hello)  # the table of states allows no other
        check_hello(message, self._service.node)
        await self.connection.send(self._service.welcome())
        self.connection.raise_limits(payload_limit(MAX_BATCH_TOKENS, self._service.hidden_size))

    async def _serve(self) -> None:
        while True:
            message = (await self.connection.receive()).message
            if isinstance(message, Goodbye):
                raise ConnectionLostError(message.reason)
            if isinstance(message, Forget):
                await self._forget(self._sessions.intersection(message.sessions))
            elif isinstance(message, Forward) and not self.connection.over:
                answer = await self._answer(message)
                if not self.connection.over:  # nobody may be waiting for it any more
                    await self.connection.send(answer)

    async def _answer(self, message: Forward) -> Message:
        stage, segments = self._read(message)
        try:
            hidden, compute_s = await stage.answer(message.hidden, segments)
        except SessionLostError as error:
            assert isinstance(error.session, tuple)
            return Lost(message.id, error.session[1], error.held)
        except CakeError as error:
            return Failed(message.id, str(error))
        except (RuntimeError, MemoryError) as error:  # torch's, out of memory among them
            log.exception("a forward failed")
            return Failed(message.id, " ".join(str(error).split())[:500])
        return Result(message.id, compute_s, hidden)

    def _read(self, message: Forward) -> tuple[WireStage, tuple[Segment, ...]]:
        """The stage and the segments that are meant; `ProtocolError` where they make no sense."""
        stage = self._service.stages.get(message.first)
        if stage is None:
            raise ProtocolError(f"no span here begins at block {message.first}")
        hidden_size, n_tokens = self._service.hidden_size, 0
        segments: dict[int, Segment] = {}
        for session, position, length in message.segments:
            segments[session] = Segment((self._number, session), position, length)
            n_tokens += length
            if not length:
                raise ProtocolError(f"the segment of session {session} is empty")
        if len(segments) < len(message.segments):
            raise ProtocolError("two segments of a batch are of the same session")
        if not 0 < n_tokens <= MAX_BATCH_TOKENS:
            raise ProtocolError(f"a batch has 1 to {MAX_BATCH_TOKENS} tokens, not {n_tokens}")
        if message.hidden.shape != (n_tokens, hidden_size):
            raise ProtocolError(
                f"hidden states of {list(message.hidden.shape)} do not fit {n_tokens} tokens of a model "
                f"of hidden size {hidden_size}"
            )
        self._sessions.update(segments)
        return stage, tuple(segments.values())

    async def _forget(self, sessions: set[int]) -> None:
        keys = [(self._number, session) for session in sessions]
        for stage in self._service.stages.values():
            await stage.forget(keys)
        self._sessions = self._sessions - sessions
