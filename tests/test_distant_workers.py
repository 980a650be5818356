"""The scenarios of slow links: what counts."""

from pathlib import Path

import pytest
from conftest import NoText, spread
from distant_workers import answered, guessing_outcome

from cake.generator import Generator


@pytest.mark.parametrize(
    ("repeat", "quote", "figure", "verdict"),
    [
        ((5, 20, True), (5, 15, True), 3.0, "holds"),
        ((5, 20, True), (5, 14, True), 2.8, "falls short"),
        ((5, 20, True), (5, 15, False), 3.0, "other tokens than without guesses: quote"),
    ],
)
def test_the_worst_request_counts(
    repeat: tuple[float, float, bool], quote: tuple[float, float, bool], figure: float, verdict: str
) -> None:
    outcome = guessing_outcome("guesses", {"repeat": repeat, "quote": quote})
    assert (outcome.figure, outcome.verdict) == (figure, verdict)
    assert "repeat: 5.0 tokens/s without guesses, 20.0 with" in outcome.measured


async def test_an_answer_ends_where_the_model_ends_it(tiny_model: Path) -> None:
    async with spread(tiny_model, [[range(0, 6)]]) as pipeline:
        endless = Generator(pipeline, NoText(), frozenset())  # type: ignore[arg-type]
        tokens, tokens_per_s = await answered(endless, list(range(20)), 6)
        assert len(tokens) == 6 and tokens_per_s > 0
        end = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
        stopped = Generator(pipeline, NoText(), frozenset([tokens[end]]))  # type: ignore[arg-type]
        assert (await answered(stopped, list(range(20)), 6))[0] == tokens[: end + 1]
