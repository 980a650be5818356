"""Kept sessions: what was computed once is not computed again, and memory stays bounded."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from conftest import GREEDY, NoText, pipeline_over, serving, transformers_ids
from test_connection import soon

from cake.errors import PromptTooLongError
from cake.generator import Generator
from cake.pool import WORTH_A_COPY, SessionPool
from cake.session import Session

PROMPT = [(7 * i * i + 3 * i + 1) % 256 for i in range(60)]


@pytest.fixture
async def generator(tiny_model: Path) -> AsyncIterator[Generator]:
    """Two workers; the master has the rest."""
    async with (
        serving(tiny_model, "w0", range(0, 2)) as a,
        serving(tiny_model, "w1", range(2, 4)) as b,
        pipeline_over(tiny_model, a, b) as pipeline,
    ):
        yield Generator(pipeline, NoText(), frozenset())  # type: ignore[arg-type]


async def answer(generator: Generator, prompt: Sequence[int], n: int) -> tuple[list[int], int]:
    """Greedy tokens, and how many tokens every stage ran for them."""
    before = [stage.stats.tokens for stage in generator.pipeline.stages]
    tokens = await soon(_tokens(generator, prompt, n))
    after = [stage.stats.tokens for stage in generator.pipeline.stages]
    (ran,) = {b - a for a, b in zip(before, after, strict=True)}
    return tokens, ran


async def _tokens(generator: Generator, prompt: Sequence[int], n: int) -> list[int]:
    return [piece.token async for piece in generator.answer(prompt, GREEDY, n)]


async def test_what_goes_on_takes_the_session_over(tiny_model: Path, generator: Generator) -> None:
    first, ran = await answer(generator, PROMPT, 4)
    assert ran == len(PROMPT) + 3
    longer = [*PROMPT, *first, 9, 8]
    tokens, ran = await answer(generator, longer, 4)
    assert tokens == transformers_ids(tiny_model, longer, 4)
    assert ran == 3 + 3, "the last token of before, the two new ones, and three of the answer"
    assert len(generator.sessions.idle) == 1


async def test_what_shares_a_beginning_gets_a_copy(tiny_model: Path, generator: Generator) -> None:
    system = PROMPT[:WORTH_A_COPY]
    long = [*system, *range(100, 140)]
    first, _ = await answer(generator, long, 4)
    other = [*system, 7, 7, 7]
    tokens, ran = await answer(generator, other, 4)
    assert tokens == transformers_ids(tiny_model, other, 4)
    assert ran == 3 + 3
    again, ran = await answer(generator, [*long, *first], 2)
    assert again == transformers_ids(tiny_model, [*long, *first], 2)
    assert ran == 1 + 1, "the first session was kept as it was"
    assert len(generator.sessions.idle) == 2


async def test_a_copy_whose_source_is_gone_is_computed(tiny_model: Path, generator: Generator) -> None:
    await answer(generator, [*PROMPT[:40], *range(60)], 2)
    (kept,) = generator.sessions.idle
    await generator.pipeline.forget(kept.number)  # a worker that was restarted, say
    tokens, _ = await answer(generator, [*PROMPT[:40], 5], 4)
    assert tokens == transformers_ids(tiny_model, [*PROMPT[:40], 5], 4)


async def test_requests_at_once_do_not_share_a_session(tiny_model: Path, generator: Generator) -> None:
    await answer(generator, PROMPT, 2)
    prompts = [[*PROMPT, i] for i in range(6)]
    tokens = await soon(asyncio.gather(*(_tokens(generator, prompt, 4) for prompt in prompts)))
    assert tokens == [transformers_ids(tiny_model, prompt, 4) for prompt in prompts]


async def test_sixty_four_wait_their_turn_and_memory_is_bounded(generator: Generator) -> None:
    generator.sessions = SessionPool(generator.close_session, kept_tokens=200, at_once=4)
    order: list[int] = []

    async def ask(number: int) -> None:
        async for _ in generator.answer([number] * 40, GREEDY, 3):
            pass
        order.append(number)

    await asyncio.wait_for(asyncio.gather(*map(ask, range(64))), 60)
    assert sorted(order) == list(range(64)), "none lost"
    assert all(abs(place - number) < 4 for place, number in enumerate(order)), "in order of arrival"
    assert sum(len(session.ids) for session in generator.sessions.idle) <= 200


async def test_the_longest_unused_goes_first() -> None:
    forgotten: list[Session] = []

    async def forget(session: Session) -> None:
        forgotten.append(session)

    pool = SessionPool(forget, kept_tokens=250)

    async def use(prompt: list[int]) -> Session:
        async with pool.session_for(prompt) as session:
            session.keep_prefix(prompt)
            session.held = len(prompt)
            return session

    a, b = await use([1] * 100), await use([2] * 100)
    assert await use([1] * 101) is a
    c = await use([3] * 100)
    assert forgotten == [b]
    assert pool.idle == (a, c)


async def test_a_session_stays_while_it_is_copied() -> None:
    pool = SessionPool(lambda _: asyncio.sleep(0), kept_tokens=0)
    source = Session([1] * 100, 100)
    pool._idle.append(source)
    async with pool.session_for([*[1] * 40, 2]) as copy:
        assert (copy.source, copy.held) == (source.number, 40)
        async with pool.session_for([1] * 101) as other:
            assert other.source == source.number, "not taken over"
        assert source in pool.idle
    assert pool.idle == ()


async def test_a_prompt_too_long_does_not_wait(generator: Generator) -> None:
    with pytest.raises(PromptTooLongError):
        await answer(generator, [1] * 600, 1)
    assert generator.sessions.idle == ()


async def test_a_number_of_sessions_is_kept_however_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker holds only so many of one master."""
    monkeypatch.setattr("cake.pool.KEPT_SESSIONS", 3)
    forgotten: list[Session] = []

    async def forget(session: Session) -> None:
        forgotten.append(session)

    pool = SessionPool(forget)
    for _ in range(5):
        async with pool.session_for(PROMPT) as session:
            session.ids[:] = [1]
    assert len(pool.idle) == 3
    assert len(forgotten) == 2


async def test_who_waits_for_a_turn_is_counted_until_it_comes_or_nobody_wants_it() -> None:
    async def forget(session: Session) -> None:
        """Nothing is held."""

    pool, news = SessionPool(forget, at_once=1), asyncio.Event()

    async def use() -> None:
        async with pool.session_for([1, 2]):
            await news.wait()

    users = [asyncio.create_task(use()) for _ in range(3)]
    await asyncio.sleep(0)
    assert pool.waiting == 2
    users[1].cancel()
    await asyncio.wait([users[1]])
    assert pool.waiting == 1
    news.set()
    await asyncio.gather(users[0], users[2])
    assert pool.waiting == 0
