"""A stage: a span of blocks on one device, able to `forward`. Master and worker run the same one.

Rule 2 of the design: sessions are addressed by position. A segment `(session, position, length)`
means "your cache is valid up to `position`; forget whatever lies beyond; append". Rewinding, sharing
a prefix, continuing a chat and recovering are all this one rule. A stage that holds fewer than
`position` tokens of a session raises `SessionLostError`.
"""

import math
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cake.budget import CacheBudget
from cake.chunks import FEW_TOKENS
from cake.device import DeviceThread
from cake.errors import SessionLostError, SetupError
from cake.kernels.block import FusedBlock, tokens_at_once
from cake.model.batch import Batch, Segment, Step, cut, fused_step
from cake.model.cache import SessionCache, bytes_per_token, capacity_for
from cake.model.config import ModelConfig
from cake.model.linear import TensorSource
from cake.model.llama import Block
from cake.model.rope import RopeTable, rope_table
from cake.protocol.messages import WireTensor
from cake.protocol.tensors import NAMES, from_wire, to_wire
from cake.stage_stats import Span, StageStats

SOON_S = 0.1  # in which the event loop need not answer anyone else


class Computed(NamedTuple):
    """What a stage made of a batch, `[n_tokens, hidden_size]`, when it began and how long it took.

    `started_s` is on `time.perf_counter`'s clock.
    """

    hidden: Tensor
    compute_s: float
    started_s: float


class Answered(NamedTuple):
    """The same for the wire, and how long it waited since it had arrived."""

    hidden: WireTensor
    compute_s: float
    started_s: float
    wait_s: float


class SpanState(Protocol):
    """What every kind of stage tells of itself."""

    @property
    def blocks(self) -> range: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def weights(self) -> str: ...
    @property
    def stats(self) -> StageStats: ...

    async def forget(self, sessions: Iterable[Hashable]) -> None:
        """Free what is held of these sessions."""


class Stage(SpanState, Protocol):
    """What a report needs of a stage, wherever it runs."""

    @property
    def node(self) -> str: ...


class WireStage(SpanState, Protocol):
    """What a worker needs of a stage that it serves."""

    def is_quick(self, n_tokens: int) -> bool:
        """Whether a batch of so many would be answered soon if the caller's thread computed it now."""

    def answer_at_once(self, hidden: WireTensor, segments: tuple[Segment, ...], arrived_s: float) -> Answered:
        """As `forward`, from the wire and back to it, in the caller's thread."""

    async def answer(self, hidden: WireTensor, segments: tuple[Segment, ...], arrived_s: float) -> Answered:
        """The same, in the device's."""


class LocalStage:
    """A span loaded on this process's device, and the caches of its sessions."""

    def __init__(
        self,
        node: str,
        blocks: range,
        config: ModelConfig,
        context: int,
        thread: DeviceThread,
        budget: CacheBudget | None = None,
    ) -> None:
        """Its caches share the `budget` with other stages of the process; without one, it has its own."""
        self.node, self.blocks, self.context = node, blocks, context
        self.stats = StageStats()
        self._config, self._thread = config, thread
        self._placement = thread.placement
        self._layers: list[Block] = []
        self._budget = budget or CacheBudget(self._placement.device)
        self._token_bytes = bytes_per_token(config, len(blocks), self._placement.dtype)
        self._caches = self._budget.new_table(self._token_bytes)
        self._few_took_s = math.inf  # the last time

    @property
    def device(self) -> str:
        """The device's name as torch writes it."""
        return str(self._placement.device)

    @property
    def dtype(self) -> str:
        """The dtype of activations."""
        return NAMES[self._placement.dtype]

    @property
    def weights(self) -> str:
        """How the matrices are kept: a dtype's name, `int8` or `int4`."""
        return self._layers[0].weights

    @property
    def n_sessions(self) -> int:
        """Sessions with a cache here."""
        return len(self._caches)

    def load(self, source: TensorSource, on_block: Callable[[int], object] = lambda _: None) -> None:
        """Read the span's weights; `on_block` is called with each block's number when it is there."""
        for number in self.blocks:
            self._thread.check()
            block = Block(source, self._config, number, self._placement)
            self._layers.append(block)
            self._budget.add_weights(block.nbytes)
            on_block(number)

    async def forward(self, batch: Batch) -> Computed:
        """Run a batch through the span and add its tokens to their sessions' caches."""
        return await self._thread.run(self._compute, batch)

    def is_quick(self, n_tokens: int) -> bool:
        """Whether a batch of so many would be answered soon if the caller's thread computed it now."""
        return n_tokens <= FEW_TOKENS and self._few_took_s < SOON_S and self._thread.may_stay_out

    def answer_at_once(self, hidden: WireTensor, segments: tuple[Segment, ...], arrived_s: float) -> Answered:
        """As `forward`, from the wire and back to it, in the caller's thread."""
        return self._thread.run_here(self._compute_wire, hidden, segments, arrived_s)

    async def answer(self, hidden: WireTensor, segments: tuple[Segment, ...], arrived_s: float) -> Answered:
        """The same in the device's thread, the conversions too: a prompt's would hold up the event loop."""
        return await self._thread.run(self._compute_wire, hidden, segments, arrived_s)

    def _compute_wire(self, hidden: WireTensor, segments: tuple[Segment, ...], arrived_s: float) -> Answered:
        result, compute_s, started_s = self._compute(Batch(from_wire(hidden), segments))
        if len(result) <= FEW_TOKENS:
            self._few_took_s = compute_s
        wait_s = max(0.0, started_s - self._thread.came_s(arrived_s))
        return Answered(to_wire(result, hidden.dtype), compute_s, started_s, wait_s)

    async def forget(self, sessions: Iterable[Hashable]) -> None:
        """Free the caches of these sessions, after the forwards that were asked for before."""
        await self._thread.run(self._drop, tuple(sessions))

    def _drop(self, sessions: tuple[Hashable, ...]) -> None:
        for session in sessions:
            self._caches.pop(session, None)
            self._budget.forgotten(session)

    def _compute(self, batch: Batch) -> Computed:
        started = time.perf_counter()
        for segment in batch.segments:
            self._check(segment)
        self._make_room(batch.segments)
        caches = [self._cut(segment) for segment in batch.segments]
        n_tokens = len(batch.hidden)
        fused = [block.fused for block in self._layers if block.fused]
        if len(fused) == len(self._layers):
            hidden = self._run_fused(batch.hidden, batch.segments, caches, fused)
        else:
            hidden = self._run(batch.hidden, batch.segments, caches)
        for segment, cache in zip(batch.segments, caches, strict=True):
            cache.length = segment.position + segment.length
        self.stats.messages += 1
        compute_s = time.perf_counter() - started
        self.stats.computed(Span(started, compute_s, n_tokens))
        return Computed(hidden, compute_s, started)

    def _run(self, hidden: Tensor, segments: Sequence[Segment], caches: Sequence[SessionCache]) -> Tensor:
        group = self._config.n_heads // self._config.n_kv_heads
        device, dtype = self._placement.device, self._placement.dtype
        came_from, hidden = hidden, hidden.to(device, dtype)
        step = Step.prepare(hidden, segments, caches, self._rope(device, dtype), group)
        for index, block in enumerate(self._layers):
            self._thread.check()
            hidden = block(hidden, index, step)
        self._thread.synchronize()
        return hidden.to(came_from.device, came_from.dtype)

    def _run_fused(
        self,
        hidden: Tensor,
        segments: Sequence[Segment],
        caches: Sequence[SessionCache],
        blocks: Sequence[FusedBlock],
    ) -> Tensor:
        cpu, result = self._placement.device, torch.empty_like(hidden)
        rope = self._rope(cpu, torch.float32)
        at_once = tokens_at_once(blocks)
        cache_of = {segment.session: cache for segment, cache in zip(segments, caches, strict=True)}
        for rows, part in cut(segments, at_once):
            x = hidden[rows].to(cpu, torch.float32, copy=True, memory_format=torch.contiguous_format)
            step = fused_step(part, [cache_of[segment.session] for segment in part], rope)
            for index, block in enumerate(blocks):
                self._thread.check()
                block(x, index, step)
            result[rows] = x
        return result

    def _rope(self, device: torch.device, dtype: torch.dtype) -> RopeTable:
        return rope_table(self._config.rope, self._config.head_dim, device, dtype)

    def _check(self, segment: Segment) -> None:
        """Refuse what cannot be done before anything is changed."""
        end = segment.position + segment.length
        if end > self.context:
            raise SetupError(f"{end} tokens do not fit into the context of {self.context} (--context)")
        self._budget.check(end)
        cache = self._caches.get(segment.session if segment.source is None else segment.source)
        held = cache.length if cache else 0
        if held < segment.position:
            raise SessionLostError(segment.session, held)

    def _make_room(self, segments: Sequence[Segment]) -> None:
        """A cache for each session, with room for its tokens; nothing that one holds is changed."""
        sources = {source for segment in segments if (source := _copied(segment)) is not None}
        needed = {segment.session for segment in segments} | sources
        self._budget.use(needed)
        longest = min(self.context, self._budget.longest)
        device, dtype = self._placement.device, self._placement.dtype
        for segment in segments:
            cache, end = self._caches.get(segment.session), segment.position + segment.length
            if cache is not None and end <= cache.capacity:
                continue
            capacity = capacity_for(end, longest)
            self._budget.make_room(capacity * self._token_bytes, segment.session, needed)
            if cache is None:
                cache = SessionCache(self._config, len(self.blocks), capacity, device, dtype)
                self._caches[segment.session] = cache
            else:
                cache.grow(capacity)

    def _cut(self, segment: Segment) -> SessionCache:
        """The session's cache, cut to the segment's position."""
        cache = self._caches[segment.session]
        source = _copied(segment)
        if source is not None:
            cache.take_over(self._caches[source], segment.position)
        cache.rewind(segment.session, segment.position)
        return cache


def _copied(segment: Segment) -> Hashable | None:
    """The session of which it takes tokens; whoever takes none needs none that is there."""
    return segment.source if segment.position else None
