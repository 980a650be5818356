"""What HTTP costs: how it is counted and judged."""

import itertools
import json
from collections.abc import AsyncIterator

import pytest
from api_overhead import Moments, moments, overhead_outcome, taking_turns, text_of

BARE = Moments(0.0, [0.050, 0.070, 0.090], 0.091)


@pytest.mark.parametrize(
    ("served", "verdict"),
    [
        (Moments(0.0, [0.055, 0.0755, 0.096], 0.098), "holds"),
        (Moments(0.0, [0.055, 0.0765, 0.098], 0.100), "falls short"),
        (Moments(0.0, [0.060, 0.0805, 0.101], 0.105), "a request takes more than 10 ms longer"),
    ],
)
def test_a_token_and_a_request_have_their_bars(served: Moments, verdict: str) -> None:
    outcome = overhead_outcome([[BARE, served]] * 3)
    assert outcome.verdict == verdict
    assert "a token 20.00 ms" in outcome.measured
    assert "a request beside that 51.0" in outcome.measured


async def test_what_completes_no_text_is_counted_with_the_next() -> None:
    async def texts() -> AsyncIterator[str]:
        for text in ("", "a", "", "b"):
            yield text

    seen = await moments(0.0, texts())
    assert len(seen.texts) == 2
    assert 0 < seen.texts[0] <= seen.texts[1] <= seen.ended


async def test_the_first_round_is_not_counted() -> None:
    numbers = itertools.count()

    async def work() -> Moments:
        return Moments(next(numbers), [], 0.0)

    rounds = await taking_turns(2, work, work)
    assert [[each.begun for each in pair] for pair in rounds] == [[2, 3], [4, 5]]


def test_the_text_of_an_event() -> None:
    first = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    assert [text_of(first), text_of(json.loads('{"choices": [{"delta": {}}]}'))] == ["", ""]
    assert text_of({"choices": [{"delta": {"content": "one"}}]}) == "one"
