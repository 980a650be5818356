#!/usr/bin/env python3
"""Draw which stage worked when: a trace of `--trace FILE` as an SVG picture, a row for each stage.

    .venv/bin/python scripts/draw_trace.py TRACE.json DRAWING.svg [--from SECONDS] [--to SECONDS]

The picture has no background and colours that can be read on a white page and on a dark one. A trace says
how many tokens a batch had, not whose they were: batches of more than a session that generates can lack are
drawn as chunks of prompts.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import click

from cake.chunks import FEW_TOKENS
from cake.command import DEBUG, errors_in_one_line
from cake.errors import CakeError

WIDTH, ROW, BAR, MARGIN, TOP, AXIS = 960.0, 46.0, 28.0, 16.0, 40.0, 32.0
LETTER, SMALL = 9.0, 6.7  # widths of an average one, bold and small, generously
LONGEST_NAME = 24
TICKS = 8  # at most about so many

INK, LINE, PROMPT, GENERATED = "#768390", "#76839055", "#3577c9", "#d0762a"
STYLE = f"""
text {{ font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: {INK}; }}
.name {{ font-weight: 600; }}
.small {{ font-size: 12px; }}
.count {{ font-size: 11px; fill: #fff; text-anchor: middle; }}
.tick {{ font-size: 12px; text-anchor: middle; }}
.prompt {{ fill: {PROMPT}; }}
.generated {{ fill: {GENERATED}; }}
line {{ stroke: {LINE}; }}
"""


@dataclass(frozen=True)
class Bar:
    """A batch; milliseconds since the trace began."""

    start: float
    end: float
    tokens: int

    @property
    def kind(self) -> str:
        """Its colour's name."""
        return "prompt" if self.tokens > FEW_TOKENS else "generated"

    def within(self, start: float, end: float) -> "Bar":
        """The part of it that lies there."""
        return Bar(max(self.start, start), min(self.end, end), self.tokens)


@dataclass(frozen=True)
class Row:
    """A stage: the node, its blocks as a person writes them, and what it did, in order of time."""

    node: str
    blocks: str
    bars: tuple[Bar, ...]

    def within(self, start: float, end: float) -> "Row":
        """Only what it did in that time."""
        shown = (bar.within(start, end) for bar in self.bars if bar.start < end and bar.end > start)
        return Row(self.node, self.blocks, tuple(shown))

    def busy(self, length: float) -> str:
        """The share of `length` milliseconds in which it worked."""
        return f"{100 * sum(bar.end - bar.start for bar in self.bars) / length:.0f}% busy"


@click.command(help=__doc__)
@click.argument("trace", type=click.Path(path_type=Path))
@click.argument("drawing", type=click.Path(path_type=Path))
@click.option("--from", "start", type=click.FloatRange(min=0), help="Seconds.  [default: the beginning]")
@click.option("--to", "end", type=click.FloatRange(min=0), help="Seconds.  [default: the end]")
@DEBUG
@errors_in_one_line
def main(trace: Path, drawing: Path, start: float | None, end: float | None, debug: bool) -> None:
    """Read, draw, write."""
    rows = read_trace(trace)
    last = max((bar.end for row in rows for bar in row.bars), default=0.0)
    begin = 1e3 * start if start is not None else 0.0
    until = 1e3 * end if end is not None else last
    drawing.write_text(draw([row.within(begin, until) for row in rows], begin, until), encoding="utf-8")


# Reading.


def read_trace(file: Path) -> list[Row]:
    """The stages in the file's order. Raises `CakeError` unless it is such a file."""
    try:
        return list(rows_of(json.loads(file.read_text(encoding="utf-8"))["traceEvents"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CakeError(f"{file} is not a trace of Cake's; write one with cake-cli --trace {file}") from error


def rows_of(events: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """A row for each thread that has a name."""
    bars: dict[int, list[Bar]] = {}
    for event in events:
        if event["ph"] == "X":
            begin, tokens = event["ts"] / 1e3, int(event["args"]["tokens"])
            bars.setdefault(event["tid"], []).append(Bar(begin, begin + event["dur"] / 1e3, tokens))
    for event in events:
        if event["ph"] == "M":
            node, _, blocks = event["args"]["name"].rpartition(" ")
            yield Row(node, blocks, tuple(sorted(bars.get(event["tid"], []), key=lambda bar: bar.start)))


# Drawing.


def draw(rows: Sequence[Row], start: float, end: float) -> str:
    """The picture of what the rows did from `start` to `end`, in milliseconds. Raises `CakeError`."""
    if start >= end or not any(row.bars for row in rows):
        raise CakeError(f"nothing was computed from {start / 1e3:g} to {end / 1e3:g} s; choose another time")
    labels = [(short(row.node), f"blocks {row.blocks} · {row.busy(end - start)}") for row in rows]
    left = MARGIN + 12 + max(max(LETTER * len(name), SMALL * len(more)) for name, more in labels)
    scale = (WIDTH - left - 2 * MARGIN) / (end - start)
    bottom = TOP + ROW * len(rows)
    parts = [*legend(left), *axis(start, end, left, scale, bottom)]
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        parts += drawn_row(row, label, TOP + ROW * i, start, left, scale)
    told = ". ".join(f"{row.node}, {more}" for row, (_, more) in zip(rows, labels, strict=True))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {bottom + AXIS:g}" '
            f'width="{WIDTH:g}" height="{bottom + AXIS:g}" role="img" aria-labelledby="title desc">',
            '<title id="title">Which stage worked when</title>',
            f'<desc id="desc">A row for each stage, a bar for each batch, from {start:.0f} to {end:.0f} ms. '
            f"{safe(told)}.</desc>",
            f"<style>{STYLE}</style>",
            *parts,
            "</svg>\n",
        ]
    )


def drawn_row(
    row: Row, label: tuple[str, str], top: float, start: float, left: float, scale: float
) -> Iterator[str]:
    """A stage's label and bars; a bar with room for it tells its tokens."""
    name, more = label
    yield f'<text class="name" x="{MARGIN:g}" y="{top + 19:g}">{safe(name)}</text>'
    yield f'<text class="small" x="{MARGIN:g}" y="{top + 36:g}">{safe(more)}</text>'
    y = top + (ROW - BAR) / 2
    for bar in row.bars:
        x, width = left + (bar.start - start) * scale, (bar.end - bar.start) * scale
        yield f'<rect class="{bar.kind}" x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{BAR:g}"/>'
        if width > SMALL * len(str(bar.tokens)) + 2:
            yield f'<text class="count" x="{x + width / 2:.2f}" y="{y + BAR / 2 + 4:g}">{bar.tokens}</text>'


def legend(left: float) -> Iterator[str]:
    """What the colours mean."""
    x = left
    for kind, words in (
        ("prompt", "chunk of a prompt (its tokens)"),
        ("generated", f"generated tokens ({FEW_TOKENS} or fewer)"),
    ):
        yield f'<rect class="{kind}" x="{x:.1f}" y="14" width="14" height="14"/>'
        yield f'<text class="small" x="{x + 20:.1f}" y="25">{words}</text>'
        x += 20 + SMALL * len(words) + 2 * MARGIN


def axis(start: float, end: float, left: float, scale: float, bottom: float) -> Iterator[str]:
    """Lines at round times, and the times below them."""
    step = round_step((end - start) / TICKS)
    digits = max(0, -math.floor(math.log10(step)))
    last = math.floor(end / step + 1e-9)
    for i in range(math.ceil(start / step - 1e-9), last + 1):
        x = left + (i * step - start) * scale
        unit = " ms" if i == last else ""
        yield f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{TOP:g}" y2="{bottom:g}"/>'
        yield f'<text class="tick" x="{x:.2f}" y="{bottom + 20:g}">{i * step:.{digits}f}{unit}</text>'


def round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def short(name: str) -> str:
    """A name that leaves room for the bars."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def safe(text: str) -> str:
    """Text as XML allows it."""
    return escape("".join(letter if letter.isprintable() else "\ufffd" for letter in text))


if __name__ == "__main__":
    main()
