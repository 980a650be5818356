"""Every config variant, dealt out in every way: the tokens are those that transformers generates."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    PATIENT,
    cpu_thread,
    greedy_ids,
    make_tiny_llama,
    pipeline_over,
    serving,
    transformers_ids,
)
from test_llama import VARIANTS

from cake.pipeline import open_pipeline
from cake.topology import Topology
from cake.weights.checkpoint import Checkpoint

PROMPT = [(11 * i * i + 5 * i + 2) % 256 for i in range(20)]
N = 32
LAYOUTS = [  # the spans of each worker, and the chunk of the prompt
    ([[range(0, 6)]], 512),
    ([[range(0, 1)], [range(1, 4)], [range(4, 6)]], 7),
    ([[range(1, 2)], [range(3, 5)]], 1),
]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
async def test_every_variant_over_workers(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = make_tiny_llama(tmp_path, **changes)
    expected = transformers_ids(folder, PROMPT, N)
    for workers, chunk in LAYOUTS:
        async with AsyncExitStack() as stack:
            served = [serving(folder, f"w{i}", *spans) for i, spans in enumerate(workers)]
            nodes = [await stack.enter_async_context(each) for each in served]
            pipeline = await stack.enter_async_context(pipeline_over(folder, *nodes))
            assert await greedy_ids(pipeline, PROMPT, N, chunk) == expected


async def test_a_prompt_of_several_chunks(tiny_model: Path) -> None:
    prompt = [(13 * i * i + i) % 256 for i in range(1100)]
    expected = transformers_ids(tiny_model, prompt, N)
    checkpoint = Checkpoint(tiny_model)
    pipeline = await open_pipeline(checkpoint, Topology({}), cpu_thread(), 2048, PATIENT)
    try:
        assert await greedy_ids(pipeline, prompt, N, 512) == expected
    finally:
        await pipeline.close()
