"""The pipeline: the ordered stages that cover every block, between the embedding and the head.

Built from a topology and a checkpoint; does not know which of its stages are remote once it is open.
Where one is lost it says so, and can be mended; what was on its way then is the caller's to send again.
"""

import asyncio
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from cake.budget import CacheBudget
from cake.cover import Offer, cheapest_cover
from cake.crew import Crew, Member
from cake.device import DeviceThread
from cake.dialling import Patience
from cake.model.batch import Batch, Segment
from cake.model.config import ModelConfig
from cake.model.linear import Placement
from cake.model.llama import Embedding, Head, load_ends
from cake.net.tls import Credentials
from cake.protocol.handshake import MAX_BATCH_TOKENS, Expectation, describe_spans
from cake.route import AnyStage, Route
from cake.routes import Recovery, Routes
from cake.stage import LocalStage
from cake.text import human_bytes
from cake.topology import MASTER, Node, Topology
from cake.weights.checkpoint import Checkpoint

log = logging.getLogger(__name__)

T = TypeVar("T")
OnBytes = Callable[[int], object]
NOWHERE: Mapping[Hashable, int] = {}


class Pipeline:
    """Token ids in, logits out; hidden states pass through the stages in order."""

    def __init__(
        self,
        config: ModelConfig,
        routes: Routes,
        embedding: Embedding,
        head: Head,
        thread: DeviceThread,
        context: int,
    ) -> None:
        self.config, self.context, self._routes = config, context, routes
        self._embedding, self._head, self._thread = embedding, head, thread

    @property
    def stages(self) -> tuple[AnyStage, ...]:
        """All stages that there are or were, in the order of their blocks."""
        return self._routes.stages

    @property
    def in_use(self) -> tuple[AnyStage, ...]:
        """The stages that sessions pass, in the order of their blocks; without any, those they would."""
        return self._routes.in_use

    @property
    def n_sessions(self) -> int:
        """Sessions of which stages may hold something."""
        return self._routes.n_sessions

    @property
    def placement(self) -> Placement:
        """Where and how the master computes."""
        return self._thread.placement

    def retold(self, session: Hashable) -> tuple[AnyStage, ...]:
        """The stages that lack a session that is replayed."""
        return self._routes.retold(session)

    @property
    def crew(self) -> Crew:
        """The workers, as they come and go."""
        return self._routes.crew

    @property
    def complete(self) -> bool:
        """Whether every block is served at this moment."""
        return self._routes.complete

    @property
    def n_stages(self) -> int:
        """Devices that can compute at the same time."""
        return self._routes.n_nodes

    @property
    def max_batch_tokens(self) -> int:
        """What every worker takes at once."""
        workers = self.crew.workers.values()
        return min([MAX_BATCH_TOKENS, *(worker.welcome.max_batch_tokens for worker in workers)])

    @property
    def network_s(self) -> float:
        """Seconds that a small batch spends on the network, as measured lately."""
        return self._routes.network_s

    async def forward(
        self, ids: Sequence[int], segments: Sequence[Segment], until: Mapping[Hashable, int] = NOWHERE
    ) -> Tensor:
        """Run tokens `ids`, laid out by `segments`, through all blocks, a session in `until` not so far.

        Returns hidden states `[n_tokens, hidden_size]`, as they come before the block that `until` gives
        for a session, and else behind the last. Raises `SessionLostError` when a stage
        holds too little of a session: run its earlier tokens again. Raises `NodeLostError` when a
        worker is gone: `mend`, and try again.
        """
        routes = [await self._routes.of(segment) for segment in segments]
        for i, segment in enumerate(segments):
            if segment.session in until:
                routes[i] = routes[i].until(until[segment.session])
        hidden = await self._thread.run(self._embed, ids)
        if len(set(routes)) == 1:
            # In a task as below, so that no part of a session overtakes the one before.
            return await asyncio.create_task(routes[0].forward(Batch(hidden, tuple(segments))))
        return await _forward_apart(hidden, segments, routes)

    def lacking(self, session: Hashable) -> int | None:
        """The block before which stages lack what they are told of a session, because others were lost.

        Those behind hold what they held. None where no stage was lost, or the last one: run all again.
        """
        return self._routes.lacking(session)

    async def mend(self) -> None:
        """Wait until every block is served again. Raises `NodeLostError` when that takes too long."""
        await self._routes.mend()

    async def choose(self, hidden: Tensor, choice: Callable[[Tensor], T]) -> T:
        """What `choice` makes of the logits of `hidden` `[n, hidden_size]`.

        Logits are `[n, vocab_size]`, float32 on the CPU; `choice` runs in the device's thread.
        """
        return await self._thread.run(lambda: choice(self._head(hidden).cpu()))

    async def forget(self, session: Hashable) -> None:
        """Free a session in every stage."""
        await asyncio.gather(*(stage.forget([session]) for stage in self._routes.forget(session)))

    async def close(self) -> None:
        """Take leave of the workers and abandon what still runs."""
        self._thread.close()
        await self.crew.close()

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self._embedding(torch.tensor(ids, device=self._thread.placement.device))


async def _forward_apart(hidden: Tensor, segments: Sequence[Segment], routes: Sequence[Route]) -> Tensor:
    """Sessions of one batch along the routes of each, at the same time."""
    shares: dict[Route, list[tuple[int, Segment]]] = {}
    start = 0
    for segment, route in zip(segments, routes, strict=True):
        shares.setdefault(route, []).append((start, segment))
        start += segment.length
    rows = {
        route: [i for start, s in share for i in range(start, start + s.length)]
        for route, share in shares.items()
    }
    results = await asyncio.gather(
        *(
            route.forward(Batch(hidden[rows[route]], tuple(segment for _, segment in share)))
            for route, share in shares.items()
        ),
        return_exceptions=True,  # one route's misfortune shall not leave the others' results to nobody
    )
    joined = torch.empty_like(hidden)
    for route, result in zip(shares, results, strict=True):
        if isinstance(result, BaseException):
            raise result
        joined[rows[route]] = result
    return joined


async def open_pipeline(
    checkpoint: Checkpoint,
    topology: Topology,
    thread: DeviceThread,
    context: int,
    patience: Patience,
    on_bytes: OnBytes = lambda _: None,
    wire_dtype: str | None = None,
    recovery: Recovery | None = None,
    credentials: Credentials | None = None,
    budget: CacheBudget | None = None,
) -> Pipeline:
    """Connect to every node, then load what remains here, so that a bad node is found out first.

    Hidden states travel in `wire_dtype`; without one, as each link allows (see `cake.wire_dtype`).
    The caches of what runs here share the `budget`, with others of this process where it is given.
    The pipeline takes over `thread` and closes it in the end; if this raises, the caller does.
    """
    config = checkpoint.config
    n_blocks = config.n_blocks
    topology.layout(n_blocks)  # or say what does not fit
    own: list[LocalStage] = []
    budget = budget or CacheBudget(thread.placement.device)
    crew = Crew(
        [Member(node, expectation(checkpoint, node)) for node in topology.nodes.values()],
        patience,
        credentials,
    )

    async def load(span: range) -> LocalStage:
        stage = LocalStage(MASTER, span, config, context, thread, budget)
        await thread.run(stage.load, checkpoint, lambda block: on_bytes(checkpoint.bytes_of(block)))
        return stage

    async def adopt(span: range) -> LocalStage | None:
        needed = sum(map(checkpoint.bytes_of, span))
        return await load(span) if may_adopt(span, needed) else None

    own_spans = topology.own_spans(n_blocks)

    def enough() -> bool:
        spans = [*own_spans, *(span for worker in crew.workers.values() for span in worker.node.spans)]
        return cheapest_cover([Offer(span, 0, None) for span in spans], n_blocks) is not None

    await crew.muster(enough)
    try:
        context = min([context, *(worker.welcome.context for worker in crew.workers.values())])
        crew.expect_context(context)
        own = [await load(span) for span in own_spans]
        embedding, head = await thread.run(load_ends, checkpoint, config, thread.placement)
        on_bytes(checkpoint.bytes_of(None))
        budget.add_weights(checkpoint.bytes_of(None))
        context = budget.context(context)
        crew.expect_context(context)  # which may be less by now
        routes = Routes(n_blocks, own, crew, wire_dtype, recovery, adopt)
        await routes.prepare()
    except BaseException:
        await crew.close()
        raise
    return Pipeline(config, routes, embedding, head, thread, context)


def may_adopt(span: range, n_bytes: int) -> bool:
    """Whether this machine has the memory for a span's weights; says what it does."""
    free = psutil.virtual_memory().available
    name = describe_spans([span])
    if n_bytes > free:
        log.warning(
            "blocks %s are lost, and take %s where %s is free here",
            name,
            human_bytes(n_bytes),
            human_bytes(free),
        )
        return False
    log.warning("blocks %s are lost; loading them here (--adopt)", name)
    return True


def expectation(checkpoint: Checkpoint, node: Node) -> Expectation:
    """What a worker that serves `node` must say in its welcome."""
    config = checkpoint.config
    fingerprints = tuple(checkpoint.span_fingerprint(span) for span in node.spans)
    return Expectation(node.name, config.fingerprint, config.hidden_size, node.spans, fingerprints)
