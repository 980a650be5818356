"""`--chat`'s status line: the cluster's figures on the terminal's last row, while an answer is made.

The rows above it scroll without it, so whatever else is written meanwhile needs to know nothing of it. It is
shown only where stderr is a terminal, and is never part of what is piped.
https://vt100.net/docs/vt510-rm/DECSTBM.html
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from typing import TextIO

from prompt_toolkit.utils import get_cwidth

from cake.cluster_view import ClusterView
from cake.generator import Generator
from cake.snapshot import Snapshot, StageShown
from cake.tasks import end

FEWEST_ROWS, FEWEST_COLUMNS = 4, 20
SAVE, RESTORE = "\x1b7", "\x1b8"  # where the cursor is, and how it writes
DOWN, UP = "\x1bD", "\x1b[A"  # down scrolls at the last row
CLEAR_ROW, CLEAR_BELOW = "\x1b[2K", "\x1b[J"
REVERSE, PLAIN = "\x1b[7m", "\x1b[m"
ALL_SCROLL = "\x1b[r"
STOPPING = (signal.SIGTERM, signal.SIGTSTP) if sys.platform != "win32" else ()


@contextlib.asynccontextmanager
async def status_line(generator: Generator, model: str) -> AsyncIterator[None]:
    """Meanwhile it is on the terminal, if there is one."""
    if not can_show(sys.stderr):
        yield
        return
    view, row = ClusterView(generator, model), LastRow(sys.stderr)
    async with view.watched():
        drawing = asyncio.create_task(_draw(view, row))
        try:
            with _gone_when_stopped(row):
                yield
        finally:
            try:
                await end([drawing])
            finally:
                row.erase()


async def _draw(view: ClusterView, row: "LastRow") -> None:
    first_tokens = view.figures.first_token_s
    before = first_tokens.n
    async for snapshot in view.events():
        row.show(status_text(snapshot, first_tokens.latest if first_tokens.n > before else None))


@contextlib.contextmanager
def _gone_when_stopped(row: "LastRow") -> Iterator[None]:
    """A shell that gets the terminal back, for ever or until `fg`, shall find all its rows."""
    loop = asyncio.get_running_loop()

    def obey(number: int) -> None:
        row.erase()
        loop.remove_signal_handler(number)
        signal.raise_signal(number)
        loop.add_signal_handler(number, obey, number)  # it goes on

    for number in STOPPING:
        loop.add_signal_handler(number, obey, number)
    try:
        yield
    finally:
        for number in STOPPING:
            loop.remove_signal_handler(number)


def can_show(stream: TextIO) -> bool:
    """Whether it is a terminal that does what it is told."""
    if os.name != "posix" and "WT_SESSION" not in os.environ:  # Windows' old console
        return False
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def status_text(shown: Snapshot, first_token_s: float | None) -> str:
    """`9.5 tokens/s · first after 0.31 s · master 0-4 up 3.1 ms · worker0 5-29 up 98 + 0.4 ms`."""
    first = "-" if first_token_s is None else f"{first_token_s:.2f} s"
    states = {node["name"]: node["state"] for node in shown["nodes"]}
    working = {stage["node"] for stage in shown["pipeline"]}
    parts = [f"{shown['rates']['tokens_per_s']:.1f} tokens/s", f"first after {first}"]
    parts += [_stage_text(stage, states[stage["node"]]) for stage in shown["pipeline"]]
    others = [node for node in shown["nodes"] if node["spans"] and node["name"] not in working]
    parts += [f"{node['name']} {node['state']}" for node in others]
    return " · ".join(parts)


def _stage_text(stage: StageShown, state: str) -> str:
    first, stop = stage["span"]
    blocks = str(first) if stop == first + 1 else f"{first}-{stop - 1}"
    if stage["compute_ms"] is None:
        return f"{stage['node']} {blocks} {state}"
    network = f" + {stage['network_ms']:.1f}" if stage["network_ms"] else ""
    return f"{stage['node']} {blocks} {state} {stage['compute_ms']:.1f}{network} ms"


class LastRow:
    """The last row of a terminal, taken from what scrolls until it is erased."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._size: os.terminal_size | None = None  # for which it was taken

    def show(self, text: str) -> None:
        """Write there, as much as there is room for; nothing on a very small terminal."""
        size = os.get_terminal_size(self._terminal.fileno())
        if size != self._size:
            self.erase()
            if size.lines < FEWEST_ROWS or size.columns < FEWEST_COLUMNS:
                return
            self._write(f"{DOWN}{UP}{SAVE}{CLEAR_BELOW}\x1b[1;{size.lines - 1}r{RESTORE}")
            self._size = size
        row = f"{REVERSE}{cut(text, size.columns)}{PLAIN}"
        self._write(f"{SAVE}\x1b[{size.lines};1H{CLEAR_ROW}{row}{RESTORE}")

    def erase(self) -> None:
        """As if it had never been there."""
        if self._size is not None:
            self._write(f"{SAVE}{ALL_SCROLL}\x1b[{self._size.lines};1H{CLEAR_ROW}{RESTORE}")
            self._size = None

    def _write(self, codes: str) -> None:
        self._terminal.write(codes)
        self._terminal.flush()


def cut(text: str, columns: int) -> str:
    """The beginning that fits, with `…` for a rest; some letters take two columns.

    Control characters are shown as `?`.
    """
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    if get_cwidth(shown) <= columns:
        return shown
    while get_cwidth(shown) >= columns:
        shown = shown[:-1]
    return shown + "…"
