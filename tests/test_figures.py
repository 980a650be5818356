"""What is counted of answers."""

from pathlib import Path

import pytest
from conftest import GREEDY, NoText, pipeline_over

from cake.figures import Distribution, Figures
from cake.generator import Generator
from cake.session import Session


def test_a_value_counts_for_the_first_bound_that_it_does_not_exceed() -> None:
    seen = Distribution([0.1, 1])
    for value in (0.05, 0.1, 0.5, 7):
        seen.add(value)
    assert seen.cumulative == [("0.1", 2), ("1", 3), ("+Inf", 4)]
    assert seen.total == pytest.approx(7.65)
    assert seen.latest == 7


def test_the_first_token_is_timed_from_the_arrival_and_the_others_from_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = iter([1.0, 1.5, 1.75])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    figures = Figures()
    with figures.answer(arrived_s=-2) as answer:
        for _ in range(3):
            answer.token()
        assert figures.answering == 1
    assert figures.answering == 0
    assert (figures.first_token_s.total, sum(figures.first_token_s.counts)) == (3, 1)
    assert (figures.between_tokens_s.total, sum(figures.between_tokens_s.counts)) == (0.75, 2)
    assert (figures.answers, figures.tokens) == (1, 3)


async def test_a_generator_counts_prompts_answers_and_what_it_need_not_run(tiny_model: Path) -> None:
    async with pipeline_over(tiny_model) as pipeline:
        generator = Generator(pipeline, NoText(), frozenset())  # type: ignore[arg-type]
        session = Session()
        prompt = [5, 6, 7, 8]
        async for _ in generator.generate(session, prompt, GREEDY, 3):
            assert generator.figures.answering == 1
        async for _ in generator.generate(session, [*prompt, 9, 10], GREEDY, 2):
            pass
        figures = generator.figures
        assert (figures.answers, figures.answering, figures.tokens) == (2, 0, 5)
        assert figures.prompt_tokens == len(prompt) + 2
        assert figures.cached_tokens == len(prompt)
        assert sum(figures.first_token_s.counts) == 2
        assert sum(figures.between_tokens_s.counts) == 3
