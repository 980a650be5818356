"""Stages on workers that hand on to one another: one message in at the first, one out from the last.

N workers cost N + 1 ways through the network, where a master that relays between them makes 2 N. Where
one worker cannot reach the next, a chain ends and the master carries hidden states to the next chain.
"""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence

from cake.errors import NodeError, NodeLostError
from cake.model.batch import Batch, Segment
from cake.protocol.messages import Forward, Hop, Result, StageReport, WireSegment
from cake.protocol.tensors import NAMES, from_wire, to_wire
from cake.remote import NUMBERS, RemoteStage, number_of
from cake.stage import Computed
from cake.stage_stats import Span
from cake.wire_dtype import Trip, WireDtype

log = logging.getLogger(__name__)

LATEST = 16  # trips


class Chain:
    """Consecutive stages; `links` are those of each worker to the next."""

    def __init__(
        self, stages: Sequence[RemoteStage], links: Sequence[int] = (), wire_dtype: str | None = None
    ) -> None:
        """Hidden states travel in `wire_dtype`; without one, as the links allow."""
        self.stages, self._chosen_dtype = tuple(stages), wire_dtype
        round_trips = sum(stage.worker.round_trip_s for stage in stages)
        self._wire_dtype = WireDtype(stages[0].node, wire_dtype, round_trips)
        self._latest_network_s: deque[float] = deque(maxlen=LATEST)
        hops = zip(links, self.stages[1:], strict=True)
        self._route = tuple(Hop(link, stage.blocks.start) for link, stage in hops)

    def until(self, block: int) -> "Chain | None":
        """The stages that begin before `block`: the last of them answers."""
        stages = [stage for stage in self.stages if stage.blocks.start < block]
        links = [hop.link for hop in self._route[: len(stages) - 1]] if stages else []
        return Chain(stages, links, self._chosen_dtype) if stages else None

    @property
    def alive(self) -> bool:
        """Whether its workers, and the links between them, are there."""
        return self._all_there and self._all_linked

    @property
    def _all_there(self) -> bool:
        return all(stage.worker.alive for stage in self.stages)

    @property
    def _all_linked(self) -> bool:
        linked = zip(self._route, self.stages, strict=False)  # the last stage has no link
        return all(hop.link in stage.worker.links for hop, stage in linked)

    @property
    def network_s(self) -> float:
        """What a small batch takes on the network: as much as the quickest of the latest."""
        return min(self._latest_network_s, default=0.0)

    async def forward(self, batch: Batch) -> Computed:
        """Send the batch to the first, wait for the last, and convert back to the batch's dtype."""
        if self._all_there and not self._all_linked:  # a worker tells of that once
            raise NodeLostError(f"a link on the way from worker {self.stages[0].node!r} is lost")
        for stage in self.stages:
            stage.stats.messages += 1
        first, *others = self.stages
        started, alone = time.perf_counter(), first.worker.idle
        longest = max(segment.length for segment in batch.segments)
        dtype = self._wire_dtype.choose(longest, batch.hidden.nbytes, NAMES[batch.hidden.dtype])
        segments = tuple([_on_the_wire(segment) for segment in batch.segments])
        hidden = to_wire(batch.hidden, dtype)
        message = Forward(next(NUMBERS), first.blocks.start, segments, self._route, (), hidden)
        frame, _ = await first.worker.ask(message, [stage.worker for stage in others])
        result = frame.message
        assert isinstance(result, Result)  # a forward has no other good answer
        self._check(result, batch)
        states = from_wire(result.hidden)
        if (states.device, states.dtype) != (batch.hidden.device, batch.hidden.dtype):
            states = states.to(batch.hidden.device, batch.hidden.dtype)
        network_s = self._count(result.stages, len(states), time.perf_counter() - started, frame.n_bytes)
        compute_s = sum(report.compute_s for report in result.stages)
        pace_s = compute_s / len(self.stages)
        n_bytes = frame.n_bytes + sum(report.n_bytes for report in result.stages)
        trip = Trip(longest, n_bytes, network_s + pace_s, pace_s)
        self._wire_dtype.observe(trip, batch.hidden.nbytes, alone)
        return Computed(states, compute_s, started)

    def _check(self, result: Result, batch: Batch) -> None:
        last = self.stages[-1].node
        if result.hidden.shape != tuple(batch.hidden.shape):
            raise NodeError(
                f"worker {last!r} answered hidden states of {str(result.hidden.shape)[:60]} to "
                f"{tuple(batch.hidden.shape)}"
            )
        if len(result.stages) != len(self.stages):
            raise NodeError(
                f"worker {last!r} answered with {len(result.stages)} reports for {len(self.stages)} stages"
            )

    def _count(self, reports: Sequence[StageReport], n_tokens: int, trip_s: float, n_bytes: int) -> float:
        """What was neither waiting for others' work nor computing was the network; equal shares of it."""
        network_s = max(0.0, trip_s - sum(report.wait_s + report.compute_s for report in reports))
        following = [*(report.n_bytes for report in reports[1:]), n_bytes]
        for stage, report, n_received in zip(self.stages, reports, following, strict=True):
            stats = stage.stats
            started_s = report.started_s + stage.worker.clock_offset
            stats.computed(Span(started_s, report.compute_s, n_tokens))
            stats.bytes_sent += report.n_bytes
            stats.bytes_received += n_received
            stats.network_s += network_s / len(reports)
        self._latest_network_s.append(network_s)
        return network_s


def _on_the_wire(segment: Segment) -> WireSegment:
    session = number_of(segment.session)
    source = session if segment.source is None else number_of(segment.source)
    return WireSegment(session, segment.position, segment.length, source)


async def link_stages(stages: Sequence[RemoteStage], wire_dtype: str | None = None) -> list[Chain]:
    """As few chains as these consecutive stages allow: a worker that cannot reach the next ends one."""
    links = await asyncio.gather(*(_link(a, b) for a, b in itertools.pairwise(stages)))
    chains: list[Chain] = []
    part: list[RemoteStage] = [stages[0]]
    numbers: list[int] = []
    for stage, link in zip(stages[1:], links, strict=True):
        if link is None:
            chains.append(Chain(part, numbers, wire_dtype))
            part, numbers = [], []
        else:
            numbers.append(link)
        part.append(stage)
    return [*chains, Chain(part, numbers, wire_dtype)]


async def _link(a: RemoteStage, b: RemoteStage) -> int | None:
    try:
        return await a.worker.link(b.worker)
    except NodeError as error:
        log.warning(
            "worker %r cannot reach worker %r at %s, so this master carries between them (%s)",
            a.node, b.node, b.worker.node.address, error,
        )  # fmt: skip
        return None
