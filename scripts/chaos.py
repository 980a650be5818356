#!/usr/bin/env python3
"""Do to a cluster what happens to devices and networks that people own, and see that nothing is lost.

    .venv/bin/python scripts/chaos.py [--only NAME]... [--short] [--json]

The demo model in float32, real worker processes, real sockets. A line for each fault as it is over;
exit code 1 if anything that must hold did not.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
import torch
from faults import FAULTS, Ending, Play, frozen, killed_with_replica, masters_killed
from intruders import INTRUDERS
from nonsense import mutated_frames
from shortage import chats_in_turn
from uninvited import uninvited

from cake.text import columns
from cake.weights.checkpoint import open_checkpoint

Fault = Callable[[Play], Awaitable[Ending]]
EVERY: dict[str, Fault] = {
    **FAULTS,
    "12 chats in room for 3": chats_in_turn,
    **INTRUDERS,
    "mutated frames": mutated_frames,
    "no cluster key": uninvited,
}
SHORTER: dict[Fault, Fault] = {
    killed_with_replica: partial(killed_with_replica, times=3),
    frozen: partial(frozen, seconds=14),
    masters_killed: partial(masters_killed, times=8),
    mutated_frames: partial(mutated_frames, n=2000),
}


@click.command(help=__doc__)
@click.option("--only", multiple=True, metavar="NAME", help="Those whose name has this in it.")
@click.option("--short", is_flag=True, help="Fewer times each.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def chaos(only: tuple[str, ...], short: bool, as_json: bool) -> None:
    """Run the faults one after another."""
    chosen = {name: fault for name, fault in EVERY.items() if not only or any(part in name for part in only)}
    if not chosen:
        raise click.BadParameter(f"no fault is called so; there are: {', '.join(EVERY)}", param_hint="--only")
    torch.set_num_threads(1)
    checkpoint, endings = open_checkpoint(None, lambda _: True), dict[str, Ending]()
    for name, fault in chosen.items():
        click.echo(f"{name} ...", err=True)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            play = Play(checkpoint, Path(folder))
            endings[name] = asyncio.run(run(SHORTER.get(fault, fault) if short else fault, play))
        took = f"{time.perf_counter() - started:.0f} s"
        click.echo(
            f"  {'held' if endings[name].held else 'BROKE'} after {took}: {endings[name].seen}", err=True
        )
    if as_json:
        click.echo(json.dumps({name: asdict(ending) for name, ending in endings.items()}))
    else:
        rows = [[name, "held" if e.held else "BROKE", e.seen] for name, e in endings.items()]
        click.echo("\n".join(columns([["fault", "", "seen"], *rows])))
    sys.exit(not all(ending.held for ending in endings.values()))


async def run(fault: Fault, play: Play) -> Ending:
    """A fault that ends in an error did not hold."""
    try:
        return await fault(play)
    except Exception as error:
        return Ending(False, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    chaos()
