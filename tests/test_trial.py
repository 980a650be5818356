"""What scenarios are made of: when an outcome holds, and what a trace of one shows."""

from pathlib import Path

import pytest
from conftest import cpu_thread, greedy_ids, spread
from trial import Bench, Outcome, gaps, in_turn, three_digits

from cake.weights.checkpoint import Checkpoint


@pytest.mark.parametrize(
    ("figure", "at_most", "wrong", "verdict"),
    [
        (3.0, False, "", "holds"),
        (2.99, False, "", "falls short"),
        (3.0, True, "", "holds"),
        (3.01, True, "", "falls short"),
        (9.0, False, "one was lost", "one was lost"),
        (float("nan"), False, "", "falls short"),
        (float("nan"), True, "", "falls short"),
    ],
)
def test_when_an_outcome_holds(figure: float, at_most: bool, wrong: str, verdict: str) -> None:
    outcome = Outcome("name", "so and so", figure, 3.0, at_most, wrong)
    assert outcome.verdict == verdict
    assert outcome.holds == (verdict == "holds") == outcome.as_json()["holds"]
    assert outcome.limit == ("≤ 3" if at_most else "≥ 3")


@pytest.mark.parametrize(
    ("number", "text"), [(1.7036, "1.7"), (0.0696, "0.0696"), (2237.4, "2237"), (300, "300")]
)
def test_figures_are_short(number: float, text: str) -> None:
    assert three_digits(number) == text


async def test_runs_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []

    def work(name: str, *seconds: float):  # type: ignore[no-untyped-def]
        left = iter(seconds)

        async def run() -> float:
            order.append(name)
            return next(left)

        return run

    assert await in_turn(3, work("a", 100, 1, 2, 9), work("b", 0, 5, 5, 6)) == [2, 5]
    assert "".join(order) == "abababab"


def test_gaps() -> None:
    assert gaps([1, 2, 5]) == [1, 3]


async def test_a_trace_shows_the_run_that_began_last(tiny_model: Path) -> None:
    thread = cpu_thread()
    thread.close()
    for traces in (False, True):
        bench = Bench(Checkpoint(tiny_model), thread.placement, 1, traces)
        async with spread(tiny_model, [[range(0, 6)]]) as pipeline:
            for prompt in (range(20), range(7)):
                bench.begin(pipeline)
                await greedy_ids(pipeline, list(prompt), 2)
        assert [[span.n_tokens for span in stage.stats.spans or []] for stage in bench.traced] == (
            [[7, 1]] if traces else []
        )
