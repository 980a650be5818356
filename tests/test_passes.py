"""Passes of one answer that are on their way together, over stages that the test holds back or slows down."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import GREEDY, NoText, greedy_ids, pipeline_over, serving
from relay import Relay
from test_generator import PROMPTS, Scripted
from test_scheduler import Gate, settle
from torch import Tensor

from cake.errors import CakeError, SessionLostError
from cake.generator import Generator
from cake.passes import Made, Passes
from cake.scheduler import Scheduler
from cake.session import Session

PROMPT = list(range(5))


class Counter:
    """A sampler that takes each next token to be the last one plus one, and counts what it draws."""

    def __init__(self) -> None:
        self.drawn = 0

    def verify(self, logits: Tensor, ids: Sequence[int], proposals: Sequence[int]) -> list[int]:
        assert [*ids[-1:], *proposals] == logits.flatten().tolist(), "the logits are these tokens'"
        chosen: list[int] = []
        for token, proposal in zip([ids[-1], *proposals], [*proposals, None], strict=True):
            chosen.append(token + 1)
            self.drawn += 1
            if token + 1 != proposal:
                break
        return chosen


class Plan:
    """Proposes `n` tokens in each of `n_passes`; what is right, but for those at the `wrong` places."""

    def __init__(self, n: int, n_passes: int, wrong: Sequence[int] = ()) -> None:
        self.n, self.n_passes, self.wrong = n, n_passes, wrong
        self.now = 0.0
        self.learned: list[tuple[int, int, float, bool]] = []

    async def begin(self, ids: Sequence[int]) -> None:
        self.now += 1000  # is no part of any pass

    def best(self) -> int:
        return self.n

    def passes(self, n: int) -> int:
        return self.n_passes

    async def propose(self, ids: Sequence[int], assumed: int, most: int, sampler: Counter) -> list[int]:
        self.now += 2
        return [99 if place in self.wrong else place for place in range(len(ids), len(ids) + max(most, 0))]

    def learn(self, proposed: int, accepted: int, seconds: float, alone: bool) -> None:
        self.learned.append((proposed, accepted, seconds, alone))


class Answer:
    """An answer of which the test lets each pass come back."""

    def __init__(self, plan: Plan, end: int = 100) -> None:
        self.gate, self.session, self.sampler, self.plan = Gate(1), Session(list(PROMPT)), Counter(), plan
        self.scheduler = Scheduler(self.gate)
        parts: list[Any] = [self.scheduler, self.session, self.sampler, plan]
        self.passes = Passes(*parts, end, lambda: plan.now)

    def add(self, made: Made) -> None:
        self.session.ids += made.tokens
        self.session.held = made.held

    async def begin(self) -> None:
        first = asyncio.create_task(self.passes.first(lambda _: None))
        await self.gate.let()
        self.add(await first)
        self.gate.seen.clear()

    async def next(self, error: Exception | None = None) -> Made:
        """The pass that was sent first comes back."""
        made = asyncio.create_task(self.passes.next())
        await self.gate.let(error)
        self.add(await made)
        return made.result()


@pytest.fixture
async def answer() -> AsyncIterator[Answer]:
    answer = Answer(Plan(3, 3))
    await answer.begin()
    yield answer
    answer.passes.close()


async def test_passes_go_one_behind_the_other_before_the_first_is_back(answer: Answer) -> None:
    made = asyncio.create_task(answer.passes.next())
    await settle()
    assert answer.gate.seen == [[(5, 4)], [(9, 4)], [(13, 4)]], "even where there is one stage"
    await answer.gate.let()
    assert (await made) == Made([6, 7, 8, 9], proposed=4, accepted=4, held=9)
    answer.add(await made)
    await answer.next()
    assert answer.gate.seen[3:] == [[(17, 4)]], "for one that came back another goes"
    assert answer.session.ids == list(range(14))


async def test_what_follows_a_wrong_guess_is_dropped(answer: Answer) -> None:
    answer.plan.wrong = [11]
    assert await answer.next() == Made([6, 7, 8, 9], proposed=4, accepted=4, held=9)
    drawn = answer.sampler.drawn
    assert await answer.next() == Made([10, 11], proposed=4 + 4 + 3, accepted=1, held=11)
    answer.plan.wrong = []
    again = asyncio.create_task(answer.passes.next())
    await settle()
    assert answer.gate.seen[-3:] == [[(11, 4)], [(15, 4)], [(19, 4)]]
    await answer.gate.let()
    await answer.gate.let()  # the two that were dropped
    assert answer.sampler.drawn == drawn + 2, "no number is drawn for them"
    assert not again.done()
    await answer.gate.let()
    assert (await again).tokens == [12, 13, 14, 15]


async def test_a_wrong_token_behind_the_proposals_is_noticed_too(answer: Answer) -> None:
    answer.plan.wrong = [9]
    made = await answer.next()
    assert made == Made([6, 7, 8, 9], proposed=4 + 4 + 3, accepted=3, held=9)
    await answer.gate.let()
    await answer.gate.let()
    await answer.next()
    assert answer.session.ids == list(range(14))


async def test_no_pass_goes_beyond_the_end() -> None:
    answer = Answer(Plan(3, 8), end=16)
    await answer.begin()
    for _ in range(3):
        await answer.next()
    assert answer.gate.seen == [[(5, 4)], [(9, 4)], [(13, 2)]]
    assert answer.session.ids == list(range(16))


async def test_a_pass_is_timed_from_the_making_of_its_proposals_to_its_choice(answer: Answer) -> None:
    made = asyncio.create_task(answer.passes.next())
    await settle()
    answer.plan.now += 1
    await answer.gate.let()
    answer.plan.now += 3
    await answer.gate.let()  # the second is back while nobody asks for it
    answer.add(await made)
    answer.plan.now += 50
    answer.add(await answer.passes.next())
    assert answer.plan.learned == [(3, 3, 2 * 3 + 1.0, True), (3, 3, 2 * 2 + 1 + 3.0, False)]


async def test_who_leaves_sends_nothing_more_and_leaves_no_error_behind(answer: Answer) -> None:
    made = asyncio.create_task(answer.passes.next())
    await settle()
    await answer.gate.let()
    answer.add(await made)
    await answer.gate.let(CakeError("the worker is gone"))  # what nobody waits for
    answer.passes.close()
    await answer.gate.let()
    assert answer.session.held == 9
    assert answer.gate.seen == [[(5, 4)], [(9, 4)], [(13, 4)]]


async def test_a_session_that_is_lost_is_sent_again_and_goes_on(answer: Answer) -> None:
    made = asyncio.create_task(answer.passes.next())
    for _ in range(3):
        await answer.gate.let(SessionLostError(answer.session.number, 0))
    assert answer.gate.seen[3:] == [[(0, 9)]], "once, and nothing behind it"
    await answer.gate.let()
    answer.add(await made)
    for _ in range(3):
        await answer.next()
    assert answer.session.ids == list(range(22))


async def test_a_session_that_is_lost_between_two_passes_goes_on(answer: Answer) -> None:
    await answer.next()
    made = asyncio.create_task(answer.passes.next())
    for _ in range(3):
        await answer.gate.let(SessionLostError(answer.session.number, 0))
    assert answer.gate.seen[-3:] == [[(0, 13)], [(13, 4)], [(17, 4)]]
    await answer.gate.let()
    answer.add(await made)
    assert answer.session.ids == list(range(14))


async def test_what_ran_behind_a_pass_that_did_not_is_not_believed(answer: Answer) -> None:
    """Stages may have held other tokens in its place, from a pass that was dropped."""
    lost = Session([50])
    other = asyncio.create_task(answer.scheduler.run(lost, Tensor.tolist))
    made = asyncio.create_task(answer.passes.next())
    await settle()
    assert [len(batch) for batch in answer.gate.seen] == [2, 1, 1]
    drawn = answer.sampler.drawn
    await answer.gate.let(
        SessionLostError(lost.number, 0)
    )  # the stage refuses the batch, and does the others
    await answer.gate.let()
    await answer.gate.let()
    assert answer.sampler.drawn == drawn
    await answer.gate.let()
    answer.add(await made)
    await answer.next()
    assert (answer.session.ids, await other) == (list(range(14)), [[50]])


async def test_over_slow_links_passes_are_on_their_way_together(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody says so: it follows from what is measured."""
    async with AsyncExitStack() as stack:
        nodes = []
        for name, span in (("a", range(0, 3)), ("b", range(3, 6))):
            node = await stack.enter_async_context(serving(tiny_model, name, span))
            relay = await stack.enter_async_context(Relay((node.host, node.port), delay=0.02))
            nodes.append(replace(node, host=relay.address[0], port=relay.address[1]))
        pipeline = await stack.enter_async_context(pipeline_over(tiny_model, *nodes))
        right = await greedy_ids(pipeline, PROMPTS[0], 80)
        parts: list[Any] = [pipeline, NoText(), frozenset(), None]
        made = Generator(*parts, lambda: Scripted(PROMPTS[0] + right))
        worker, away = pipeline.crew.workers["a"], list[int]()
        ask = worker.ask

        async def counted(*question: Any) -> Any:
            away.append(len(worker._waiting))
            return await ask(*question)

        monkeypatch.setattr(worker, "ask", counted)
        session = Session()
        tokens = [piece.token async for piece in made.generate(session, PROMPTS[0], GREEDY, 80)]
        assert tokens == right
        assert max(away) > 1, "others were on their way when one was sent"
        assert session.held <= len(session.ids)
