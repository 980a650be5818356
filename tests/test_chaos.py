"""A short form of scripts/chaos.py: real workers, killed and pestered, beside masters who must not notice."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
from faults import Ending, Play, eight_requests
from nonsense import mutated_frames

from cake.weights.checkpoint import Checkpoint

SHORT = {
    "killed with eight requests": eight_requests,
    "mutated frames": partial(mutated_frames, n=400),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from /proc")
@pytest.mark.parametrize("fault", SHORT.values(), ids=SHORT)
def test_what_must_hold_holds(
    demo_model: Path, tmp_path: Path, fault: Callable[[Play], Awaitable[Ending]]
) -> None:
    async def played() -> Ending:
        return await fault(Play(Checkpoint(demo_model), tmp_path))

    ending = asyncio.run(played())
    assert ending.held, ending.seen
