"""The budget: who is evicted, who never is, and that right answers do not depend on it."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import torch
from conftest import GREEDY, NoText, cpu_thread, loaded_stage, pipeline_over, serving

from cake.budget import CacheBudget
from cake.device import DeviceThread
from cake.errors import CakeError, PromptTooLongError, SessionLostError
from cake.generator import Generator
from cake.memory import device_memory_bytes
from cake.model.batch import Batch, Segment
from cake.model.cache import FIRST_CAPACITY, SessionCache
from cake.session import Session
from cake.stage import LocalStage
from cake.weights.checkpoint import Checkpoint

CPU = torch.device("cpu")
SPAN = range(1, 4)
TOKEN = 3 * 2 * 2 * 16 * 4  # bytes: blocks, keys and values, heads, channels, float32
SMALL = FIRST_CAPACITY * TOKEN  # a session's first cache


def states(n_tokens: int) -> torch.Tensor:
    return torch.randn(n_tokens, 64, generator=torch.Generator().manual_seed(n_tokens))


async def feed(stage: LocalStage, *segments: Segment) -> torch.Tensor:
    hidden = states(sum(segment.length for segment in segments))
    return (await stage.forward(Batch(hidden, segments))).hidden


def holding(stage: LocalStage) -> set[object]:
    return set(stage._caches)


@asynccontextmanager
async def stage_with(folder: Path, limit: int):
    thread = cpu_thread()
    budget = CacheBudget(CPU, limit)
    try:
        yield await loaded_stage(Checkpoint(folder), SPAN, thread, budget), budget
    finally:
        thread.close()


async def test_who_is_idle_longest_goes(tiny_model: Path) -> None:
    async with stage_with(tiny_model, 3 * SMALL) as (stage, budget):
        for name in "abc":
            await feed(stage, Segment(name, 0, 5))
        await feed(stage, Segment("a", 5, 1))
        assert budget.used == budget.limit
        await feed(stage, Segment("d", 0, 5))
        assert holding(stage) == {"a", "c", "d"}
        with pytest.raises(SessionLostError) as caught:
            await feed(stage, Segment("b", 5, 1))
        assert caught.value.held == 0
        await stage.forget("acd")
        assert budget.used == 0


async def test_a_cache_that_grows_is_counted_twice_while_it_does(tiny_model: Path) -> None:
    async with stage_with(tiny_model, 4 * SMALL) as (stage, budget):
        for name in "abc":
            await feed(stage, Segment(name, 0, 200))
        await feed(stage, Segment("c", 200, 100))  # 256 tokens become 512, beside the 256
        assert holding(stage) == {"b", "c"}
        assert budget.used == 3 * SMALL


async def test_nobody_of_a_batch_makes_room_for_another_of_it(tiny_model: Path) -> None:
    async with stage_with(tiny_model, 2 * SMALL) as (stage, _):
        for name in "abc":
            await feed(stage, Segment(name, 0, 5))
        await feed(stage, Segment("a", 0, 5), Segment("b", 5, 1))
        assert holding(stage) == {"a", "b"}, "the two fit, if only together"
        with pytest.raises(SessionLostError) as caught:
            await feed(stage, Segment("a", 5, 1), Segment("b", 6, 1), Segment("c", 0, 1))
        assert (caught.value.session, caught.value.held) == ("c", 0)
        await feed(stage, Segment("a", 5, 1), Segment("b", 6, 1))


async def test_nobody_makes_room_for_a_copy_of_itself(tiny_model: Path) -> None:
    async with stage_with(tiny_model, 2 * SMALL) as (stage, _):
        await feed(stage, Segment("source", 0, 50))
        await feed(stage, Segment("other", 0, 5))
        await feed(stage, Segment("copy", 40, 5, "source"))
        assert holding(stage) == {"source", "copy"}


async def test_stages_share_a_budget_and_evict_a_session_from_all(
    tiny_model: Path, thread: DeviceThread
) -> None:
    budget, checkpoint = CacheBudget(CPU, 4 * SMALL), Checkpoint(tiny_model)
    stages = [await loaded_stage(checkpoint, span, thread, budget) for span in (range(0, 3), range(3, 6))]
    for name in "ab":
        for stage in stages:
            await feed(stage, Segment(name, 0, 5))
    assert budget.used == budget.limit
    await feed(stages[0], Segment("c", 0, 5))
    assert [holding(stage) for stage in stages] == [{"b", "c"}, {"b"}]


async def test_who_can_never_fit_hears_how_much_does(tiny_model: Path) -> None:
    async with stage_with(tiny_model, 300 * TOKEN) as (stage, budget):
        assert budget.longest == 256
        await feed(stage, Segment("a", 0, 250))
        words = (
            r"^the 230.4 kB for caches hold 256 tokens of a session, and the session has 257; raise --cache"
        )
        with pytest.raises(CakeError, match=words):
            await feed(stage, Segment("a", 250, 7))
        await feed(stage, Segment("a", 250, 6))
    async with stage_with(tiny_model, TOKEN) as (_, budget):
        with pytest.raises(CakeError, match="hold 1 tokens of a session, too few for a session; give more"):
            budget.context(512)


async def test_the_default_is_what_the_weights_leave_of_four_fifths(tiny_model: Path, thread) -> None:
    stage_budget = CacheBudget(CPU)
    before = stage_budget.limit
    assert before == int(0.8 * device_memory_bytes(CPU))
    stage = await loaded_stage(Checkpoint(tiny_model), SPAN, thread, stage_budget)
    matrices = sum(block.nbytes for block in stage._layers)
    assert matrices == 3 * 4 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    assert stage_budget.limit == before - matrices
    assert stage_budget.context(512) == 512


async def test_sessions_that_are_over_leave_nothing(tiny_model: Path) -> None:
    async with stage_with(tiny_model, 2 * SMALL) as (stage, budget):
        for name in range(50):
            await feed(stage, Segment(name, 0, 2))
            await stage.forget([name] if name % 3 else [])
        await stage.forget(range(50))
        assert (budget.used, dict(budget._last_used)) == (0, {})


PROMPTS = [[(7 * i + j) % 251 for j in range(20 + i)] for i in range(12)]


@contextmanager
def watched(budget: CacheBudget, spans: Sequence[range]) -> Iterator[list[int]]:
    """The bytes of these spans' caches whenever one was allocated, an old one that it replaces included."""
    n_blocks = {len(span) for span in spans}
    seen: list[int] = []
    allocate, grow = SessionCache.__init__, SessionCache.grow

    def new(self: SessionCache, *arguments: object) -> None:
        allocate(self, *arguments)  # type: ignore[arg-type]
        if self.storage.shape[0] in n_blocks:
            seen.append(budget.used + self.nbytes)

    def grown(self: SessionCache, capacity: int) -> None:
        before = budget.used
        grow(self, capacity)
        if self.storage.shape[0] in n_blocks:
            seen.append(before + self.nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SessionCache, "__init__", new)
        patch.setattr(SessionCache, "grow", grown)
        yield seen


async def chat(generator: Generator, turns: int, together: bool) -> list[list[int]]:
    """Every chat takes its turn, or all at once: the token ids of all in the end."""
    chats = [list(prompt) for prompt in PROMPTS]
    sessions = [Session() for _ in PROMPTS]

    async def turn(i: int) -> None:
        pieces = generator.generate(sessions[i], chats[i], GREEDY, 8)
        chats[i] += [piece.token async for piece in pieces]
        chats[i] += [i, 100, 7]  # the next thing that a person says

    for _ in range(turns):
        if together:
            await asyncio.gather(*(turn(i) for i in range(len(chats))))
        else:
            for i in range(len(chats)):
                await turn(i)
    return chats


def generator_over(pipeline) -> Generator:
    return Generator(pipeline, NoText(), frozenset())  # type: ignore[arg-type]


@pytest.fixture
async def expected(tiny_model: Path) -> list[list[int]]:
    async with pipeline_over(tiny_model) as pipeline:
        return await chat(generator_over(pipeline), 3, together=False)


@pytest.mark.parametrize("spans", [[[range(6)]], [[range(0, 2), range(5, 6)], [range(2, 5)]]])
@pytest.mark.parametrize("together", [False, True], ids=["in turn", "together"])
async def test_twelve_chats_in_a_budget_for_three(
    tiny_model: Path, expected: list[list[int]], spans: Sequence[Sequence[range]], together: bool
) -> None:
    budget = CacheBudget(CPU, 3 * (SMALL // len(SPAN)) * sum(map(len, spans[0])))
    async with AsyncExitStack() as stack:
        seen = stack.enter_context(watched(budget, spans[0]))
        nodes = [await stack.enter_async_context(serving(tiny_model, "tight", *spans[0], budget=budget))]
        for i, others in enumerate(spans[1:]):
            nodes.append(await stack.enter_async_context(serving(tiny_model, f"w{i}", *others)))
        pipeline = await stack.enter_async_context(pipeline_over(tiny_model, *nodes))
        assert await chat(generator_over(pipeline), 3, together) == expected
    assert max(seen) <= budget.limit
    assert len(seen) > 12, "some were evicted and came back"


async def test_a_prompt_too_long_for_the_workers_budget_is_refused_before_it_starts(tiny_model: Path) -> None:
    budget = CacheBudget(CPU, 100 * 2 * TOKEN)
    async with (
        serving(tiny_model, "tight", range(6), budget=budget) as node,
        pipeline_over(tiny_model, node) as pipeline,
    ):
        assert pipeline.context == 100
        with pytest.raises(
            PromptTooLongError, match=r"100 tokens and the context holds 100.* --cache-memory"
        ):
            generator_over(pipeline).check([1] * 100)
        assert budget.used == 0


async def test_the_masters_own_stages_have_a_budget_too(tiny_model: Path) -> None:
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(serving(tiny_model, "w", range(0, 3)))
        budget = CacheBudget(CPU, 90 * TOKEN)
        pipeline = await stack.enter_async_context(pipeline_over(tiny_model, node, budget=budget))
        assert pipeline.context == 90
