"""The crew: the workers of a topology. Dials those that are not there, and says who came and who was lost.

Does not know which of them a token passes.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from cake.dialling import HungUpError, Patience, UnreachableError, connect_worker
from cake.errors import NodeError, NodeLostError
from cake.net.tls import Credentials
from cake.news import News
from cake.protocol.handshake import Expectation
from cake.remote import RemoteWorker
from cake.tasks import end
from cake.topology import Node

log = logging.getLogger(__name__)

REDIAL_S = 0.5  # between trials of somebody who is gone
FORBEARANCE_S = 3.0  # with those whose blocks another serves too


@dataclass(frozen=True)
class Member:
    """A node of the topology, and what its worker must say in its welcome."""

    node: Node
    expected: Expectation


class Crew:
    """Workers by the names of their nodes, those that are there."""

    def __init__(
        self, members: Iterable[Member], patience: Patience, credentials: Credentials | None = None
    ) -> None:
        self.workers: dict[str, RemoteWorker] = {}
        self.news = News()  # somebody comes or goes
        self._members = {member.node.name: member for member in members}
        self._patience, self._credentials = patience, credentials
        self._dialling: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    async def muster(self, enough: Callable[[], bool]) -> None:
        """Connect to all, in no order. Whoever is late is dialled on, once the others are `enough`.

        Raises `NodeError` of the first who is not the worker that the topology promises, or cannot be
        reached and is needed.
        """
        tasks = {asyncio.create_task(self._join(name, self._patience)): name for name in self._members}
        try:
            missing = await self._joined(set(tasks), enough)
        except BaseException:
            await end(tasks)
            await self.close()
            raise
        for name in [tasks[task] for task in missing]:
            address = self._members[name].node.address
            log.warning("worker %r at %s is not there yet; others serve its blocks", name, address)
            self._dial(name)

    async def _joined(
        self, waiting: set["asyncio.Task[None]"], enough: Callable[[], bool]
    ) -> set["asyncio.Task[None]"]:
        """Wait for all; those of them who are late or cannot be reached and are not needed."""
        unreachable: dict[asyncio.Task[None], BaseException] = {}
        while waiting:
            timeout = FORBEARANCE_S if enough() else None
            done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if isinstance(error := task.exception(), UnreachableError):
                    unreachable[task] = error
                else:
                    task.result()
            if not done and enough():
                break
        if unreachable and not enough():
            raise next(iter(unreachable.values()))
        for task in waiting:
            task.cancel()
        return waiting | unreachable.keys()

    async def _join(self, name: str, patience: Patience) -> None:
        """Connect to one; from then on it is part of the crew until it is lost."""
        member = self._members[name]
        worker = await connect_worker(member.node, member.expected, patience, self._credentials)
        if worker.alive:
            self.workers[name] = worker
            worker.on_lost = lambda error: self._lost(name, error)
        else:  # it left as soon as it had come
            self._dial(name)
        self.news.tell()

    def _lost(self, name: str, error: NodeLostError) -> None:
        del self.workers[name]
        self.news.tell()
        if not self._closed:
            log.warning("%s; looking for it", error)
            self._dial(name)

    def _dial(self, name: str) -> None:
        if name not in self._dialling:
            self._dialling[name] = asyncio.create_task(self._redial(name))

    async def _redial(self, name: str) -> None:
        """Until it comes; what keeps it out is told once."""
        patience = replace(self._patience, total=10, longest_pause=REDIAL_S, aloud=False)
        told, hung_up = "", False
        while name not in self.workers:
            try:
                await self._join(name, patience)
            except UnreachableError:
                hung_up = False
            except NodeError as error:
                again, hung_up = hung_up, isinstance(error, HungUpError)
                if str(error) != told and (again or not hung_up):  # once may be the end that is known of
                    log.warning("%s", error)
                    told = str(error)
                await asyncio.sleep(REDIAL_S)
        del self._dialling[name]
        log.warning("worker %r is there", name)

    @property
    def nodes(self) -> list[Node]:
        """All nodes, in the order of the topology."""
        return [member.node for member in self._members.values()]

    @property
    def absent(self) -> list[Node]:
        """The nodes whose workers are not there."""
        return [member.node for name, member in self._members.items() if name not in self.workers]

    def expect_context(self, context: int) -> None:
        """From now on workers with room for fewer tokens in a session are turned away."""
        self._members = {
            name: replace(member, expected=replace(member.expected, context=context))
            for name, member in self._members.items()
        }

    async def close(self) -> None:
        """Take leave of all, and dial nobody any more."""
        self._closed = True
        await end(self._dialling.values())
        await asyncio.gather(*(worker.close() for worker in list(self.workers.values())))
