"""What a cluster key costs: how it is judged, and that single tokens take turns."""

from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace

import pytest
from encryption import alternating_tokens, encryption_outcome

from cake.session import Session


@pytest.mark.parametrize(
    ("tokens", "prompts", "verdict"),
    [
        ([0.1, 0.102], [5.0, 5.1], "holds"),
        ([0.1, 0.11], [5.0, 5.1], "falls short"),
        ([0.1, 0.1], [5.0, 6.0], "prompts fall below 0.9"),
    ],
)
def test_both_bars_must_be_reached(tokens: list[float], prompts: list[float], verdict: str) -> None:
    outcome = encryption_outcome(tokens, prompts, 512)
    assert outcome.verdict == verdict
    assert "10.00 tokens/s plain" in outcome.measured
    assert f"a prompt of 512 {512 / 5:.1f} and" in outcome.measured


class Talker:
    """Notes who made a token."""

    def __init__(self, name: str, made: list[str]) -> None:
        self.name, self.made = name, made

    async def generate(
        self, session: Session, prompt: Sequence[int], sampling: object, n: int
    ) -> AsyncIterator[int]:
        for i in range(n):
            self.made.append(self.name)
            yield i

    async def close_session(self, session: Session) -> None:
        self.made.append(f"{self.name} done")


async def test_tokens_of_one_and_of_the_other_take_turns() -> None:
    made: list[str] = []
    bench = SimpleNamespace(runs=1, prompt=lambda n: [1] * n)
    seconds = await alternating_tokens(bench, 2, Talker("a", made), Talker("b", made))  # type: ignore[arg-type]
    assert made == [*"ab" * 3, "a done", "b done"] * 2
    assert len(seconds) == 2
    assert min(seconds) > 0
