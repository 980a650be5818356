"""Many clients at once: none is lost and none overtaken, and how the scenario of them judges."""

from pathlib import Path

import pytest
from api_load import TOGETHER_S, Asked, Load, load_outcome
from http_served import serving_http


async def test_many_clients_are_answered_in_order_of_arrival(tiny_model: Path) -> None:
    async with serving_http(tiny_model, api_key=None) as served:
        load = Load(served.url, "tiny", 4, lambda: served.generator.pipeline.n_sessions)
        prompts = [[i, *range(i % 7, i % 7 + 24)] for i in range(40)]
        await load.run(prompts, n_connections=8)
        assert len(load.asked) == 40
        assert load.wrong == ""
        assert served.generator.figures.tokens == 40 * 4


def asked(sent_s: float, first_s: float, error: str = "") -> Asked:
    """Moments in units of what counts as together."""
    return Asked(sent_s * TOGETHER_S, first_s * TOGETHER_S, error)


@pytest.mark.parametrize(
    ("requests", "verdict"),
    [
        ([asked(0, 10), asked(2, 12), asked(4, 13), asked(9, 20)], "holds"),
        ([asked(0, 10), asked(2, 9.5), asked(4, 13), asked(9, 20)], "holds"),  # hardly later
        ([asked(0, 10), asked(2, 18), asked(4, 13), asked(9, 16)], "1 were overtaken"),
        ([asked(0, 10), asked(2, 12), asked(4, 13, "503"), asked(9, 20)], "1 lost: 503"),
    ],
)
def test_nobody_may_be_lost_or_overtaken(requests: list[Asked], verdict: str) -> None:
    load = Load("", "", 1, lambda: 0, requests, [50, 60, 61, 60])
    assert load_outcome(load, 2, session=10).verdict == verdict


def test_memory_may_hardly_grow() -> None:
    requests = [asked(i, i + 1) for i in range(4)]
    assert load_outcome(Load("", "", 1, lambda: 0, requests, [50, 60, 70, 60]), 2, session=10).figure == 0.5
