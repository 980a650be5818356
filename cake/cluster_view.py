"""The cluster's view of itself: who is there, the way of a token, and what everybody did in the last second.

A snapshot is an object of JSON. Looks twice a second at what is counted anyway, so that tokens pay nothing
for it. Knows nothing of HTTP or terminals.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import NamedTuple

from cake.figures import Figures
from cake.generator import Generator
from cake.memory import memory_of
from cake.news import News
from cake.protocol.messages import Memory
from cake.protocol.tensors import NAMES
from cake.remote import RemoteStage
from cake.route import AnyStage
from cake.snapshot import Condition, MemoryShown, NodeShown, Rates, Snapshot, StageShown, Standing, State
from cake.stage_stats import StageStats
from cake.tasks import end
from cake.topology import MASTER, Node

EVERY_S = 0.5
WINDOW_S = 1.0

Key = tuple[str, int]  # a stage: its node and its first block


class Count(NamedTuple):
    """What a stage had done at some moment."""

    messages: int
    passes: int
    compute_s: float
    network_s: float
    n_bytes: int


class Sample(NamedTuple):
    """All counts at a moment of `time.perf_counter`'s clock."""

    at_s: float
    tokens: int
    prompt_tokens: int
    stages: dict[Key, Count]


class ClusterView:
    """Snapshots of a generator's cluster; while `watched`, also a stream of them."""

    def __init__(self, generator: Generator, model: str) -> None:
        self._generator, self._model = generator, model
        self._own_memory = memory_of(generator.pipeline.placement.device)
        self._samples: deque[Sample] = deque([self._sample()])
        self._published = News()
        self._retold: set[str] = set()  # nodes, since the latest was taken
        self._changed = asyncio.Event()
        self._latest, self._n_taken = self.snapshot(), 0
        self.streams = 0  # of events, that are open
        self._open = True

    @property
    def figures(self) -> Figures:
        """What is counted of answers."""
        return self._generator.figures

    @property
    def stages(self) -> tuple[AnyStage, ...]:
        """All stages that there are or were."""
        return self._generator.pipeline.stages

    @property
    def kept_tokens(self) -> int:
        """Tokens of idle sessions, kept for requests to come."""
        return self._generator.sessions.n_tokens

    @property
    def standing(self) -> Standing:
        """How many requests and sessions there are now, and how many replays there were."""
        return {
            "requests": self.figures.answering,
            "waiting": self._generator.sessions.waiting,
            "sessions": self._generator.pipeline.n_sessions,
            "replays": self.figures.replays,
        }

    @property
    def condition(self) -> Condition:
        """Whether requests can be answered; "degraded" where a node is lost, but others serve its blocks."""
        pipeline = self._generator.pipeline
        if not self._open:
            return "leaving"
        if not pipeline.complete:
            return "unready"
        return "degraded" if pipeline.crew.absent else "ready"

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Meanwhile look twice a second, and at once where somebody comes or goes."""
        watching = asyncio.create_task(self._watch())
        crew = self._generator.pipeline.crew
        with crew.news.heard_by(self._hear), self.figures.news.heard_by(self._hear):
            try:
                yield
            finally:
                self.close()
                await end([watching])

    def close(self) -> None:
        """End all streams of events."""
        self._open = False
        self._published.tell()

    async def events(self) -> AsyncGenerator[Snapshot, None]:
        """A snapshot at once, and then each that is taken, until the view is closed."""
        self.streams += 1
        try:
            snapshot = self.snapshot()
            while self._open:
                seen = self._n_taken
                yield snapshot
                while self._open and seen == self._n_taken:
                    await self._published.wait(EVERY_S)
                snapshot = self._latest
        finally:
            self.streams -= 1

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), EVERY_S)
            self._changed.clear()
            self._samples.append(self._sample())
            while len(self._samples) > 2 and self._samples[1].at_s <= self._samples[-1].at_s - WINDOW_S:
                self._samples.popleft()
            self._latest = self.snapshot()
            self._n_taken += 1
            self._retold = self._retold_now()
            self._published.tell()

    def _hear(self) -> None:
        """However short a replay is, the next event shows it."""
        self._retold |= self._retold_now()
        self._changed.set()

    def _is_retold(self, name: str) -> bool:
        return name in self._retold or name in self._retold_now()

    def _retold_now(self) -> set[str]:
        """The nodes that are told again what they lack."""
        pipeline = self._generator.pipeline
        return {stage.node for session in self.figures.replaying for stage in pipeline.retold(session)}

    def _sample(self) -> Sample:
        stages = {_key(stage): _count(stage.stats) for stage in self._generator.pipeline.stages}
        return Sample(time.perf_counter(), self.figures.tokens, self.figures.prompt_tokens, stages)

    def snapshot(self) -> Snapshot:
        """The cluster as it is now; rates and means are of the last second."""
        pipeline, now = self._generator.pipeline, self._sample()
        in_use = pipeline.in_use
        return {
            "at": time.time(),
            "model": self._model,
            "n_blocks": pipeline.config.n_blocks,
            "context": pipeline.context,
            "nodes": [self._master(), *(self._worker(node, in_use) for node in pipeline.crew.nodes)],
            "pipeline": [self._way(stage, now) for stage in in_use],
            "rates": self._rates(now),
        }

    def _master(self) -> NodeShown:
        pipeline = self._generator.pipeline
        placement = pipeline.placement
        spans = [stage.blocks for stage in pipeline.stages if stage.node == MASTER]
        return {
            "name": MASTER,
            "address": None,
            "state": "replaying" if self._is_retold(MASTER) else "up",
            "device": str(placement.device),
            "dtype": NAMES[placement.dtype],
            **_memory(self._own_memory()),
            "spans": _pairs(spans),
            "holds": ["embedding", "head"],
        }

    def _worker(self, node: Node, in_use: Iterable[AnyStage]) -> NodeShown:
        pipeline = self._generator.pipeline
        worker = pipeline.crew.workers.get(node.name)
        known = next((stage for stage in pipeline.stages if stage.node == node.name), None)
        return {
            "name": node.name,
            "address": node.address,
            "state": self._state(node, in_use),
            "device": known.device if known else None,
            "dtype": known.dtype if known else None,
            **_memory(worker.memory if worker else None),
            "spans": _pairs(node.spans),
            "holds": [],
        }

    def _state(self, node: Node, in_use: Iterable[AnyStage]) -> State:
        pipeline = self._generator.pipeline
        if node.name not in pipeline.crew.workers:
            return "lost"
        if self._is_retold(node.name):
            return "replaying"
        return "up" if any(stage.node == node.name for stage in in_use) else "standby"

    def _way(self, stage: AnyStage, now: Sample) -> StageShown:
        before, after = self._before(stage), now.stages[_key(stage)]
        passes, seconds = after.passes - before.passes, now.at_s - self._samples[0].at_s
        return {
            "node": stage.node,
            "span": _pair(stage.blocks),
            "compute_ms": _mean_ms(after.compute_s - before.compute_s, passes),
            "network_ms": _mean_ms(after.network_s - before.network_s, passes),
            "bytes_per_s": round((after.n_bytes - before.n_bytes) / seconds, 1),
            "active": self._active(stage, after),
        }

    def _before(self, stage: AnyStage) -> Count:
        """What it had done when the last second began; one that is new has done nothing then."""
        return self._samples[0].stages.get(_key(stage), NOTHING)

    def _active(self, stage: AnyStage, now: Count) -> bool:
        """Whether a pass is in it, or was since the last event but one."""
        before = self._samples[-2 if len(self._samples) > 1 else -1].stages.get(_key(stage), NOTHING)
        if now.messages > before.messages:
            return True
        if isinstance(stage, RemoteStage):
            return stage.worker.alive and not stage.worker.idle
        return self._generator.busy

    def _rates(self, now: Sample) -> Rates:
        before = self._samples[0]
        seconds = now.at_s - before.at_s
        return {
            "tokens_per_s": round((now.tokens - before.tokens) / seconds, 2),
            "prompt_tokens_per_s": round((now.prompt_tokens - before.prompt_tokens) / seconds, 2),
            **self.standing,
        }


NOTHING = Count(0, 0, 0.0, 0.0, 0)


def _count(stats: StageStats) -> Count:
    n_bytes = stats.bytes_sent + stats.bytes_received
    return Count(stats.messages, stats.passes, stats.compute_s, stats.network_s, n_bytes)


def _key(stage: AnyStage) -> Key:
    return stage.node, stage.blocks.start


def _memory(known: Memory | None) -> MemoryShown:
    """As JSON; nothing where it is not known."""
    used, total = known if known and known.total else (None, None)
    return {"memory_used": used, "memory_total": total}


def _pair(span: range) -> list[int]:
    return [span.start, span.stop]


def _pairs(spans: Iterable[range]) -> list[list[int]]:
    return [_pair(span) for span in spans]


def _mean_ms(seconds: float, passes: int) -> float | None:
    return round(1e3 * seconds / passes, 3) if passes else None
