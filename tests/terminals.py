"""A terminal whose two ends are ours, drawn as a person sees it."""

import os
import select
import sys
from collections.abc import Callable

import pytest

if sys.platform == "win32":
    pytest.skip("Windows has no terminals of this kind", allow_module_level=True)

import fcntl
import struct
import termios

import pyte

COLUMNS, ROWS = 90, 12


class Terminal:
    """Its screen can be read; programs write to `slave`."""

    def __init__(self, columns: int = COLUMNS) -> None:
        self.columns = columns
        self.master, self.slave = os.openpty()
        self.resize(ROWS)
        self.screen = pyte.HistoryScreen(columns, ROWS, history=1000, ratio=1)
        self.screen.write_process_input = self.type  # what programs ask of it
        self._stream = pyte.ByteStream(self.screen)
        self.seen = b""

    def resize(self, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, self.columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read(self) -> None:
        """What has been written; waits for something."""
        assert select.select([self.master], [], [], 60)[0], f"nothing comes after {self.rows}"
        data = os.read(self.master, 65536)
        self.seen += data
        self._stream.feed(data)

    def until(self, good: Callable[[], bool]) -> None:
        while not good():
            self.read()

    @property
    def rows(self) -> list[str]:
        return [row.rstrip() for row in self.screen.display]

    @property
    def last_row(self) -> str:
        return self.rows[-1]

    @property
    def text(self) -> str:
        """All that was ever on it, and is not erased, without line breaks."""
        gone = ["".join(row[i].data for i in range(self.columns)) for row in self.screen.history.top]
        return "".join([*gone, *(row.ljust(self.columns) for row in self.rows)])

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)
