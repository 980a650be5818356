#!/usr/bin/env python3
"""Measure Cake: frame round trip, prompt and generation speed, locally and over workers.

    .venv/bin/python scripts/bench.py [--model FOLDER] [--workers 2] [--quality] [--llama-cpp] [--json]

Workers are real processes on loopback. Each speed is the median of several runs, after one that is
not counted; a table or, with --json, one JSON object goes to stdout.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click
import torch
from machine import machine
from peer import CHOICES, TYPES, check_python
from scenarios import SCENARIOS, run_scenarios, scenario_lines
from speed import Lengths, Wanted, figure_lines, measure_figures
from trial import Bench

from cake.command import DEBUG, errors_in_one_line
from cake.device import available_cores, choose_dtype
from cake.errors import CakeError
from cake.model.linear import Placement, Quantization
from cake.trace import check_writable, write_trace
from cake.weights.checkpoint import open_checkpoint


@click.command(help=__doc__)
@click.option("--model", help="Folder or hub id.  [default: the demo model]")
@click.option("--workers", type=click.IntRange(min=0), default=2, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--generate-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Of the local run.  [default: all cores]")
@click.option("--worker-threads", type=click.IntRange(min=1), help="[default: an equal share of the cores]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: as cake-cli]")
@click.option("--quantize", type=click.Choice(["none", "int8", "int4"]), default="none", show_default=True)
@click.option("--round-trips", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option(
    "--quality", is_flag=True, help="Add what fewer bits cost in quality, of weights and on the wire."
)
@click.option(
    "--quality-tokens", type=click.IntRange(min=512), default=8192, show_default=True, help="Tokens scored."
)
@click.option("--llama-cpp", is_flag=True, help="Add llama.cpp's speed, run by run.")
@click.option(
    "--llama-type",
    type=click.Choice(CHOICES),
    help=f"Its weights.  [default: {', '.join(f'{kind} for {mode}' for mode, kind in TYPES.items())}]",
)
@click.option(
    "--llama-python",
    type=click.Path(exists=True, dir_okay=False),
    help="A Python that has llama-cpp-python.  [default: this one]",
)
@click.option(
    "--scenario",
    "names",
    type=click.Choice([*SCENARIOS, "all"]),
    multiple=True,
    help="Run these instead: many requests, long prompts, slow links, encryption, loading, memory, HTTP.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="A file for which stage worked when in a scenario's last run; scripts/draw_trace.py draws it.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@DEBUG
@errors_in_one_line
def bench(
    model: str | None,
    dtype: str | None,
    quantize: Quantization,
    names: tuple[str, ...],
    trace: Path | None,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Run the scenarios that are named, or measure the figures."""
    chosen = list(SCENARIOS) if "all" in names else list(dict.fromkeys(names))
    if trace:
        check_trace(trace, chosen)
    wanted = wanted_figures(quantize, options)
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(model, lambda _: True)
    cpu = torch.device("cpu")
    placement = Placement(cpu, choose_dtype(dtype, checkpoint.config.dtype, cpu), quantize)
    facts = {
        "model": checkpoint.name,
        "dtype": str(placement.dtype).removeprefix("torch."),
        "quantize": quantize,
        "machine": machine(),
    }
    if chosen:
        trial = Bench(checkpoint, placement, wanted.sizes.runs, traces=trace is not None)
        outcomes = run_scenarios(chosen, trial)
        if trace:
            write_trace(trial.traced, trace)
        told = [{"scenario": name, **o.as_json()} for name, o in zip(chosen, outcomes, strict=True)]
        result = {"runs": trial.runs, "scenarios": told}
        lines = scenario_lines(outcomes)
    else:
        result = measure_figures(checkpoint, placement, wanted)
        lines = figure_lines(result)
    click.echo(json.dumps({**facts, **result}) if as_json else "\n".join([*fact_lines(facts), *lines]))


def check_trace(trace: Path, chosen: list[str]) -> None:
    """Before anything is measured for it. Raises `CakeError`."""
    if len(chosen) != 1:
        raise CakeError("--trace shows one scenario; name it with --scenario")
    check_writable(trace)


def wanted_figures(quantize: Quantization, options: dict[str, Any]) -> Wanted:
    """The options as the figures take them; checks that llama.cpp is there if it is asked for."""
    peer_python = (options["llama_python"] or sys.executable) if options["llama_cpp"] else None
    if peer_python:
        check_python(peer_python)
    return Wanted(
        sizes=Lengths(options["prompt_tokens"], options["generate_tokens"], options["runs"]),
        workers=options["workers"],
        threads=options["threads"] or available_cores(),
        worker_threads=options["worker_threads"],
        round_trips=options["round_trips"],
        quality_tokens=options["quality_tokens"] if options["quality"] else None,
        peer_python=peer_python,
        peer_type=options["llama_type"] or TYPES[quantize],
    )


def fact_lines(facts: dict[str, Any]) -> list[str]:
    """What was measured where."""
    here = facts["machine"]
    return [
        f"{facts['model']} in {facts['dtype']}, quantize {facts['quantize']}",
        f"{here['processor']}, {here['cores']} cores, kernels for {here['instructions'] or 'none'}",
    ]


if __name__ == "__main__":
    bench()
