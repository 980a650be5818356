"""`--trace FILE`: which stage worked when, in the Chrome trace format that Perfetto opens.

Times of other machines are put on the master's clock; they are as exact as half a round trip.
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cake.errors import CakeError
from cake.protocol.handshake import describe_spans
from cake.stage import Stage
from cake.stage_stats import Span

MOST_SPANS = 100_000  # of a stage; then the oldest are forgotten


def check_writable(file: Path) -> None:
    """Before anything is computed for it. Raises `CakeError`."""
    try:
        file.write_text("")
    except OSError as error:
        raise CakeError(f"--trace {file} cannot be written: {error.strerror}") from error


def start_tracing(stages: Sequence[Stage]) -> None:
    """From now on every stage keeps what it does."""
    for stage in stages:
        stage.stats.spans = deque(maxlen=MOST_SPANS)


def write_trace(stages: Sequence[Stage], file: Path) -> None:
    """All that was kept, a row for each stage."""
    file.write_text(json.dumps(trace_of(stages)), encoding="utf-8")


def trace_of(stages: Sequence[Stage]) -> dict[str, Any]:
    """The JSON object: events in microseconds since the first began."""
    begin = min((span.started_s for stage in stages for span in stage.stats.spans or []), default=0.0)
    events: list[dict[str, Any]] = []
    for row, stage in enumerate(stages):
        name = f"{stage.node} {describe_spans([stage.blocks])}"
        events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": name}})
        events += [_event(row, span, begin) for span in stage.stats.spans or []]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(row: int, span: Span, begin: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": f"{span.n_tokens} token{'s' * (span.n_tokens > 1)}",
        "pid": 1,
        "tid": row,
        "ts": round(1e6 * (span.started_s - begin), 1),
        "dur": round(1e6 * span.compute_s, 1),
        "args": {"tokens": span.n_tokens},
    }
