"""The scenarios of many requests: what they count."""

from pathlib import Path

import pytest
from conftest import NoText, spread
from many_requests import Crowd, last_chunk, waiting_outcome
from test_connection import soon

from cake.chunks import CHUNK_BESIDE_OTHERS
from cake.generator import Generator


async def test_the_last_chunk_runs_alone_upon_what_came_before(tiny_model: Path) -> None:
    async with spread(tiny_model, [[range(0, 3)], [range(3, 6)]]) as pipeline:
        generator = Generator(pipeline, NoText(), frozenset())  # type: ignore[arg-type]
        assert await soon(last_chunk(generator, list(range(100)), runs=2)) > 0
        before = 100 - CHUNK_BESIDE_OTHERS
        assert [stage.stats.tokens for stage in pipeline.stages] == 2 * [before + 3 * CHUNK_BESIDE_OTHERS]


async def test_a_crowd_notes_who_had_the_first_token_when(tiny_model: Path) -> None:
    sizes = iter([5, 7, 6, 11])
    async with spread(tiny_model, [[range(0, 6)]]) as pipeline:
        generator = Generator(pipeline, NoText(), frozenset())  # type: ignore[arg-type]
        crowd = Crowd(generator, lambda: next(sizes))
        for number in (0, 1, 3, 2):
            await soon(crowd.ask(number, [number] * 40, 3))
    assert (crowd.order, crowd.wrong) == ([0, 1, 3, 2], "not in order of arrival")
    assert crowd.growth == 4, "the second half's most beyond the first half's"


@pytest.mark.parametrize(
    ("sizes", "order", "holds"),
    [
        ([50, 60, 61, 60], [0, 1, 2, 3], True),
        ([50, 60, 70, 80], [0, 1, 2, 3], False),
        ([60, 60, 55, 50], [0, 1, 2, 3], True),
        ([60, 60, 55, 50], [1, 0, 2, 3], False),
    ],
)
def test_memory_may_hardly_grow_and_nobody_overtakes(sizes: list[int], order: list[int], holds: bool) -> None:
    crowd = Crowd(None, lambda: 0, order, sizes)  # type: ignore[arg-type]
    assert waiting_outcome(crowd, 4, idle=40).holds == holds
