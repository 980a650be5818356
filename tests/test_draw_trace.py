"""The drawing of a trace: what stands in it, and what cannot be drawn."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from conftest import greedy_ids, spread
from draw_trace import main, round_step, safe

from cake.trace import start_tracing, write_trace

SVG = "{http://www.w3.org/2000/svg}"


def trace(file: Path, *rows: tuple[str, list[tuple[float, float, int]]]) -> Path:
    """A trace of these stages: each batch's beginning and length in ms, and its tokens."""
    events: list[dict[str, Any]] = []
    for tid, (name, batches) in enumerate(rows):
        events.append({"ph": "M", "name": "thread_name", "tid": tid, "args": {"name": name}})
        events += [
            {"ph": "X", "tid": tid, "ts": 1e3 * start, "dur": 1e3 * length, "args": {"tokens": tokens}}
            for start, length, tokens in batches
        ]
    file.write_text(json.dumps({"traceEvents": events}))
    return file


def run(*arguments: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, [str(each) for each in arguments])


def drawn(tmp_path: Path, file: Path, *options: object) -> ElementTree.Element:
    """The picture of a trace."""
    picture = tmp_path / "picture.svg"
    result = run(file, picture, *options)
    assert result.exit_code == 0, result.stderr
    return ElementTree.parse(picture).getroot()


def bars(svg: ElementTree.Element) -> list[tuple[str, float, float, float]]:
    """Kind, x, y and width of each batch; the legend's two squares come first."""
    found = [
        (each.attrib["class"], *(float(each.attrib[name]) for name in ("x", "y", "width")))
        for each in svg.iter(f"{SVG}rect")
    ]
    return found[2:]


def texts(svg: ElementTree.Element, kind: str) -> list[str]:
    """What is written in one style."""
    return ["".join(each.itertext()) for each in svg.iter(f"{SVG}text") if each.get("class") == kind]


def test_a_bar_for_each_batch_where_and_as_long_as_it_was(tmp_path: Path) -> None:
    file = trace(
        tmp_path / "trace.json",
        ("pc 0-14", [(0, 100, 64), (100, 50, 24), (300, 10, 1)]),
        ("old 15-29", [(100, 100, 64), (200, 50, 24), (310, 10, 16)]),
    )
    svg = drawn(tmp_path, file)
    kinds, xs, ys, widths = zip(*bars(svg), strict=True)
    assert kinds == ("prompt", "prompt", "generated") * 2
    scale = widths[0] / 100
    assert widths == pytest.approx([scale * n for n in (100, 50, 10, 100, 50, 10)], abs=0.02)
    assert xs == pytest.approx([xs[0] + scale * n for n in (0, 100, 300, 100, 200, 310)], abs=0.02)
    assert ys[0] == ys[2] < ys[3] == ys[5]
    assert xs[5] + widths[5] < float(svg.attrib["width"])
    assert texts(svg, "name") == ["pc", "old"]
    assert texts(svg, "small")[2:] == ["blocks 0-14 · 50% busy", "blocks 15-29 · 50% busy"]
    assert texts(svg, "tick") == ["0", "50", "100", "150", "200", "250", "300 ms"]
    assert texts(svg, "count")[:2] == ["64", "24"]
    title, desc = svg.findtext(f"{SVG}title"), svg.findtext(f"{SVG}desc")
    assert title == "Which stage worked when"
    assert desc and "from 0 to 320 ms" in desc and "old, blocks 15-29 · 50% busy" in desc


def test_a_window_cuts_what_reaches_beyond_it(tmp_path: Path) -> None:
    file = trace(tmp_path / "trace.json", ("pc 0-29", [(0, 1000, 64), (1000, 1000, 1), (2500, 500, 1)]))
    svg = drawn(tmp_path, file, "--from", 0.9, "--to", 1.9)
    first, second = bars(svg)
    assert (first[0], second[0]) == ("prompt", "generated")
    assert second[3] == pytest.approx(9 * first[3], rel=1e-3)
    assert texts(svg, "tick")[0] == "1000"
    assert texts(svg, "small")[2:] == ["blocks 0-29 · 100% busy"]


def test_any_name_is_text(tmp_path: Path) -> None:
    name = "<script>&\"'\x00 a name that goes on and on"
    svg = drawn(tmp_path, trace(tmp_path / "trace.json", (f"{name} 3", [(0, 1, 1)])))
    assert texts(svg, "name") == ["<script>&\"'\ufffd a name tha…"]
    assert safe("a & b") == "a &amp; b"
    desc = svg.findtext(f"{SVG}desc")
    assert desc and "goes on and on, blocks 3" in desc


async def test_what_cake_recorded_can_be_drawn(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    async with spread(tiny_model, [[range(0, 2)], [range(2, 4)]]) as pipeline:
        start_tracing(pipeline.stages)
        await greedy_ids(pipeline, list(range(20)), 3)
        write_trace(pipeline.stages, file)
    svg = drawn(tmp_path, file)
    assert [kind for kind, *_ in bars(svg)] == ["prompt", "generated", "generated"] * 3
    assert texts(svg, "name") == ["w0", "w1", "master"]


@pytest.mark.parametrize("options", [("--from", 5), ("--to", 0), ("--from", 0.002, "--to", 0.001)])
def test_a_time_without_work_is_refused(tmp_path: Path, options: tuple[object, ...]) -> None:
    file = trace(tmp_path / "trace.json", ("pc 0-29", [(0, 1000, 64)]))
    result = run(file, tmp_path / "picture.svg", *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: nothing was computed from ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "picture.svg").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": [1]}', '{"traceEvents": [{"ph": "X"}]}'])
def test_what_is_no_trace_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    result = run(file, tmp_path / "picture.svg")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "other.json is not a trace" in result.stderr


@pytest.mark.parametrize(("least", "step"), [(0.3, 0.5), (1, 1), (1.1, 2), (24, 50), (51, 100), (1000, 1000)])
def test_steps_of_the_axis_are_round(least: float, step: float) -> None:
    assert round_step(least) == pytest.approx(step)
