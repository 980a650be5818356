"""Routes: which stages the tokens of a session pass, chosen when it begins and anew when one is lost.

Nodes that serve the same blocks share the sessions. A session that goes on along another route finds
stages that hold nothing of it, so the scheduler runs its tokens again, as far as the last of these.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from cake.chain import Chain, link_stages
from cake.cover import Offer, cheapest_cover
from cake.crew import Crew
from cake.errors import NodeLostError, SessionLostError
from cake.model.batch import Segment
from cake.protocol.handshake import describe_spans
from cake.remote import RemoteStage
from cake.route import AnyStage, Route, is_leaving
from cake.stage import LocalStage
from cake.topology import Node

ADOPT_AFTER_S = 2.0  # a worker that was only restarted is back by then
LAST_RESORT = 1e6  # a cost above any number of sessions
LEAVING = 1e9  # and above that of all that can be adopted

Adopt = Callable[[range], Awaitable[LocalStage | None]]  # load a span here, where that can be


@dataclass(frozen=True)
class Recovery:
    """When nobody serves a block: seconds to wait for somebody, and whether to load it here instead."""

    rejoin_timeout: float = 60.0
    adopt: bool = False


class Routes:
    """Finds routes through the stages that are there: the master's `own`, and those of the crew."""

    def __init__(
        self,
        n_blocks: int,
        own: Sequence[LocalStage],
        crew: Crew,
        wire_dtype: str | None = None,
        recovery: Recovery | None = None,
        adopt: Adopt | None = None,
    ) -> None:
        self.crew = crew
        self._n_blocks, self._wire_dtype, self._adopt = n_blocks, wire_dtype, adopt
        self._recovery = recovery or Recovery()
        self._own, self._adopted = list(own), list[LocalStage]()
        self._remote: dict[tuple[str, int], RemoteStage] = {}  # by node and first block, lost ones too
        self._built: dict[tuple[AnyStage, ...], Route] = {}
        self._of_session: dict[Hashable, Route] = {}
        self._latest: Route | None = None  # that was chosen
        self._retold: dict[Hashable, tuple[AnyStage, ...]] = {}  # that lacked it when it moved
        self._lacking: dict[Hashable, int] = {}  # the block behind the last stage that lacks a session
        self._changing = asyncio.Lock()

    @property
    def stages(self) -> tuple[AnyStage, ...]:
        """All stages that there are or were, in the order of their blocks."""
        self._present()
        every: list[AnyStage] = [*self._own, *self._remote.values(), *self._adopted]
        return tuple(sorted(every, key=lambda stage: stage.blocks.start))

    @property
    def in_use(self) -> tuple[AnyStage, ...]:
        """The stages that sessions pass, in the order of their blocks; without any, those they would."""
        routes = {route for route in self._of_session.values() if route.alive}
        routes = routes or ({self._latest} if self._latest else set())
        every = {(stage.blocks.start, stage.node): stage for route in routes for stage in route.stages}
        return tuple(stage for _, stage in sorted(every.items()))

    @property
    def n_sessions(self) -> int:
        """Sessions of which stages may hold something."""
        return len(self._of_session)

    def retold(self, session: Hashable) -> tuple[AnyStage, ...]:
        """The stages that lack a session that is replayed: the new ones on its way, or else all."""
        route = self._of_session.get(session)
        stages = route.stages if route else ()
        return tuple(stage for stage in self._retold.get(session, ()) if stage in stages) or stages

    @property
    def n_nodes(self) -> int:
        """Devices that can compute at the same time."""
        return max(1, len(self.crew.workers) + bool(self._own or self._adopted))

    @property
    def complete(self) -> bool:
        """Whether every block is served at this moment."""
        return not self._missing()

    @property
    def network_s(self) -> float:
        """Seconds that a small batch spends on the network along the slowest route, as measured lately."""
        return max((route.network_s for route in self._built.values() if route.alive), default=0.0)

    async def prepare(self) -> None:
        """Link the workers of the cheapest route, so that a way that is closed is known at once."""
        await self._choose(None)

    async def of(self, segment: Segment) -> Route:
        """The route of the segment's session. Raises `NodeLostError` where there is none.

        One through a worker that is leaving is kept only where there is no other. Raises
        `SessionLostError` where the session has to go on along another, as that lacks its tokens.
        """
        route = self._of_session.get(segment.session)
        if _is_good(route):
            return route
        async with self._changing:
            route = self._of_session.get(segment.session)
            if _is_good(route):  # another part of the session was quicker
                return route
            chosen = await self._choose(self._of_session.get(segment.source))
            if route is not None and route.alive and chosen.leaving:
                return route
            self._of_session[segment.session] = chosen
        if route is not None:
            await self._move(segment, route, chosen)
        return chosen

    async def _move(self, segment: Segment, old: Route, new: Route) -> None:
        session, lacking = segment.session, [stage for stage in new.stages if stage not in old.stages]
        lost = bool(lacking and segment.position and segment.source is None)
        if lost:
            self._retold[session] = tuple(lacking)
            self._lacking[session] = max(lacking[-1].blocks.stop, self._lacking.get(session, 0))
        for stage in old.stages:
            if stage not in new.stages:  # it shall not keep what nobody asks for
                await stage.forget([session])
        if lost:
            raise SessionLostError(session, 0)

    def lacking(self, session: Hashable) -> int | None:
        """The block before which stages lack a session since it has moved; asked once.

        The stages behind hold what they held. None where it has not moved, or there are none.
        """
        if session not in self._lacking:
            self._retold.pop(session, None)  # they have been told since
        block = self._lacking.pop(session, self._n_blocks)
        return block if block < self._n_blocks else None

    def forget(self, session: Hashable) -> tuple[AnyStage, ...]:
        """The session is over; the stages that may hold something of it."""
        self._lacking.pop(session, None)
        self._retold.pop(session, None)
        route = self._of_session.pop(session, None)
        return route.stages if route else ()

    async def mend(self) -> None:
        """Wait until every block is served. Raises `NodeLostError` when that takes too long."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while missing := self._missing():
            waited = loop.time() - began
            if self._recovery.adopt and waited >= ADOPT_AFTER_S and await self._take_over(missing):
                continue
            left = self._recovery.rejoin_timeout - waited
            if left <= 0:
                spans = describe_spans([offer.span for offer in missing])
                raise NodeLostError(
                    f"nobody has served blocks {spans} for {waited:.0f} s (--rejoin-timeout); start their "
                    "worker again, or let the master run them with --adopt"
                )
            await self.crew.news.wait(min(ADOPT_AFTER_S, left))

    async def _choose(self, preferred: Route | None) -> Route:
        """A route along the stages with the fewest sessions, unless one is preferred and there."""
        if preferred is not None and preferred.alive and not preferred.leaving:
            return preferred
        cover = cheapest_cover(self._offers(), self._n_blocks)
        if cover is None:
            raise NodeLostError("some blocks are not served any more")
        stages = tuple(offer.by for offer in cover)
        self._built = {key: route for key, route in self._built.items() if route.alive}
        if stages not in self._built:
            self._built[stages] = Route(await self._legs(stages))
        self._latest = self._built[stages]
        return self._latest

    async def _legs(self, stages: Iterable[AnyStage]) -> list[LocalStage | Chain]:
        legs: list[LocalStage | Chain] = []
        for remote, run in itertools.groupby(stages, lambda stage: isinstance(stage, RemoteStage)):
            if remote:
                chain = [stage for stage in run if isinstance(stage, RemoteStage)]
                legs += await link_stages(chain, self._wire_dtype)
            else:
                legs += [stage for stage in run if not isinstance(stage, RemoteStage)]
        return legs

    def _offers(self) -> list[Offer[AnyStage]]:
        """What is there, each with its number of sessions; what was adopted only if there is nothing else.

        And who is leaving only if not even that.
        """
        load = Counter(stage for route in self._of_session.values() for stage in route.stages)
        there: list[AnyStage] = [*self._own, *self._present()]
        offers = [Offer(stage.blocks, load[stage] + LEAVING * is_leaving(stage), stage) for stage in there]
        return offers + [Offer(stage.blocks, LAST_RESORT + load[stage], stage) for stage in self._adopted]

    def _present(self) -> list[RemoteStage]:
        """The stages of those who are there; who came back goes on with the old figures."""
        present: list[RemoteStage] = []
        for name, worker in self.crew.workers.items():
            for span in worker.node.spans:
                stage = self._remote.get((name, span.start))
                if stage is None or stage.worker is not worker:
                    stage = RemoteStage(worker, span, stage.stats if stage else None)
                    self._remote[name, span.start] = stage
                present.append(stage)
        return present

    def _missing(self) -> list[Offer[Node | None]]:
        """Spans of those who are gone, without which there is no route."""
        offers = [Offer[Node | None](offer.span, 0, None) for offer in self._offers()]
        for node in self.crew.absent:
            offers += [Offer(span, 1, node) for span in node.spans]
        cover = cheapest_cover(offers, self._n_blocks) or []
        return [offer for offer in cover if offer.by is not None]

    async def _take_over(self, missing: Iterable[Offer[Node | None]]) -> bool:
        """Load here what nobody else serves; whether that was possible."""
        async with self._changing:
            held = [stage.blocks for stage in self._adopted]
            for offer in missing:
                if offer.span in held:
                    continue
                stage = await self._adopt(offer.span) if self._adopt else None
                if stage is None:
                    return False
                self._adopted.append(stage)
        return True


def _is_good(route: Route | None) -> TypeGuard[Route]:
    return route is not None and route.alive and not route.leaving
