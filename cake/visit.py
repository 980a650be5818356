"""One conversation of a worker: a master's, from handshake to parting, or another worker's for it.

A master's visit owns its sessions and its links: connections to other workers, over which results go
straight to the next stage. What arrives over such a link belongs to the visit that it names, and is
answered to that visit's master.
"""

import asyncio
import contextlib
import functools
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cake.device import StoppedError
from cake.errors import ClusterKeyError, ProtocolError
from cake.links import Links
from cake.net.admission import Admission
from cake.net.connection import DEAD_AFTER_S, Connection, ConnectionLostError, no_memory
from cake.net.keyed import KeyedConnection
from cake.net.tls import Credentials
from cake.protocol.frames import Frame
from cake.protocol.handshake import MAX_BATCH_TOKENS, SOFTWARE, check_hello, payload_limit, span_infos
from cake.protocol.messages import (
    VERSION,
    Forget,
    Forward,
    Goodbye,
    Hello,
    Leaving,
    Link,
    Memory,
    Message,
    Welcome,
)
from cake.stage import WireStage
from cake.work import Work

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
REFUSAL_S = 0.25  # more than a handshake takes: when one fails does not tell where


@dataclass(frozen=True)
class Service:
    """What a worker offers: its stages by their first block, and the words of its welcome."""

    node: str
    model: str
    hidden_size: int
    context: int
    stages: Mapping[int, WireStage]
    fingerprints: Sequence[str]
    dead_after: float = DEAD_AFTER_S
    credentials: Credentials | None = None  # without, nobody is asked for a cluster key
    memory: Callable[[], Memory] = no_memory  # of the device, as masters are told

    def welcome(self, visit: str) -> Welcome:
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
            visit=visit,
            clock=time.perf_counter(),
        )


class Visit:
    """One connection. `of_masters` are the visits of masters by their secret names."""

    def __init__(
        self,
        service: Service,
        connection: Connection,
        number: int,
        of_masters: "dict[str, Visit]",
        admission: Admission,
    ) -> None:
        self.connection = connection
        self.parting_words: str | None = None
        self._admission = admission
        self._service, self._of_masters = service, of_masters
        self._name = secrets.token_hex(16)
        self._links = Links(service.credentials, service.dead_after, self._say)
        self.work = Work(number, service.stages, service.hidden_size, self._links, connection)
        self._left = False

    async def run(self) -> None:
        """Serve until the peer leaves or says something wrong; a master's sessions are freed then."""
        who = self.connection.peer_address
        try:
            owner = await self._come_in()
        except ProtocolError as error:
            self.parting_words = str(error)
            if self._admission.refused.worth_a_line(self.connection.peer_host):
                log.warning("%s turned away: %s", who, error)
            return
        except ConnectionLostError as error:
            log.debug("no handshake: %s", error)
            return
        role = "master" if owner is self else "worker"
        log.info("%s %s came", role, who)
        try:
            await self._serve(owner)
        except ProtocolError as error:
            self.parting_words = str(error)
            log.warning("%s %s dropped: %s", role, who, error)
        except ConnectionLostError as error:
            log.info("%s %s left: %s", role, who, error)
        finally:
            await self._leave()

    @property
    def over(self) -> bool:
        """Whether nobody waits for results any more, and nothing of its sessions may be kept."""
        return self._left or self.connection.over

    async def _leave(self) -> None:
        self._left = True
        self._of_masters.pop(self._name, None)
        self._links.close()
        with contextlib.suppress(StoppedError):  # a worker that ends frees everything anyway
            await self.work.forget()

    async def _come_in(self) -> "Visit":
        """The handshake, within its time; refusals of those who have no key all take as long."""
        door, host = self._admission, self.connection.peer_host
        loop = asyncio.get_running_loop()
        refuse_at = loop.time() + REFUSAL_S + door.refused.pause(host)
        try:
            return await asyncio.wait_for(self._shake_hands(host), HANDSHAKE_S)
        except (asyncio.TimeoutError, ProtocolError) as error:
            door.refused.add(host)
            if isinstance(error, ClusterKeyError):
                door.guessed.add(host)
            if self._service.credentials:
                door.fails(self)
                await asyncio.sleep(refuse_at - loop.time())
            raise ProtocolError(str(error) or f"no hello within {HANDSHAKE_S:g} s") from error

    async def _shake_hands(self, host: str) -> "Visit":
        """The visit that this connection speaks for: itself, if a master is at its other end."""
        if not self._admission.allows(host):
            raise ProtocolError(f"this worker allows no masters at {host} (--allow)")
        if isinstance(self.connection, KeyedConnection):
            preface = await self.connection.hear_preface()
            self._admission.begins(self)
            await self.connection.prove_as_worker(preface, lambda: self._admission.guessed.turn(host))
        message = (await self.connection.receive()).message
        assert isinstance(message, Hello)  # the table of states allows no other
        check_hello(message, self._service.node)
        owner = self._of_masters.get(message.visit) if message.visit else self
        if owner is None:
            raise ProtocolError("no master is here by that visit")
        self._admission.leave(self)
        await self.connection.send(self._service.welcome(self._name if owner is self else ""))
        if owner is self:
            self._of_masters[self._name] = self
        self.connection.raise_limits(payload_limit(MAX_BATCH_TOKENS, self._service.hidden_size))
        self.connection.keep_alive(self._service.dead_after, self._service.memory)
        return owner

    async def _serve(self, owner: "Visit") -> None:
        self.connection.offer_first(functools.partial(_answer_at_once, owner))
        while True:
            frame = await self.connection.receive()
            message = frame.message
            if isinstance(message, Goodbye):
                raise ConnectionLostError(message.reason)
            if isinstance(message, Forward):
                if not owner.over:
                    await owner.work.forward(message, frame)
            elif owner is not self:
                raise ProtocolError(f"a {message.kind} message is for masters to say")
            elif isinstance(message, Forget):
                await self.work.forget(message.sessions)
            elif isinstance(message, Link):
                await self._say(await self._links.open(message))

    async def announce_leaving(self) -> None:
        """Tell the master that this worker will stop soon."""
        await self._say(Leaving())

    async def _say(self, answer: Message) -> None:
        """To the master, if it is still there; its own connection finds out if it is not."""
        if not self.connection.over:
            with contextlib.suppress(ConnectionLostError):
                await self.connection.send(answer)


def _answer_at_once(owner: Visit, frame: Frame) -> bool:
    """Whether what has just arrived needed no time, and is dealt with."""
    message = frame.message
    return isinstance(message, Forward) and not owner.over and owner.work.forward_at_once(message, frame)
