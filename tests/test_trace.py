"""The trace: every batch of every stage, on one clock."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import greedy_ids, pipeline_over, serving
from test_connection import soon

from cake.errors import CakeError
from cake.trace import check_writable, start_tracing, write_trace

PROMPT = list(range(20))


async def test_every_batch_of_every_stage(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    check_writable(file)
    async with (
        serving(tiny_model, "w0", range(0, 2)) as a,
        serving(tiny_model, "w1", range(2, 4)) as b,
        pipeline_over(tiny_model, a, b) as pipeline,
    ):
        start_tracing(pipeline.stages)
        await soon(greedy_ids(pipeline, PROMPT, 3))
        write_trace(pipeline.stages, file)
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {0: "w0 0-1", 1: "w1 2-3", 2: "master 4-5"}
    spans = {row: [e for e in events if e["ph"] == "X" and e["tid"] == row] for row in names}
    for row in spans.values():
        assert [span["args"]["tokens"] for span in row] == [20, 1, 1]
        assert [span["name"] for span in row] == ["20 tokens", "1 token", "1 token"]
        for earlier, later in pairwise(row):
            assert later["ts"] >= earlier["ts"] + earlier["dur"]
    assert min(span["ts"] for row in spans.values() for span in row) == 0


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CakeError, match=r"--trace .*no-such/trace.json cannot be written: No such file"):
        check_writable(tmp_path / "no-such" / "trace.json")
