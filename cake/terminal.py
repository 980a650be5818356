"""Where words go: answers to stdout, everything else to stderr. Often both are the same terminal.

There, whatever comes in the middle of an answer begins on a row of its own, and the answer goes on in the
next one. To what is piped nothing is added.
"""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator


class _Row:
    """The row that an answer has begun, or a bar takes. Log lines may come from other threads."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.begun = False
        self.ended = False  # an answer's, and nothing has been told since
        self.bars: list[Callable[[], object]] = []  # what makes them go

    def end(self) -> None:
        if self.begun and one_terminal():
            sys.stderr.write("\n")
        self.begun = self.ended = False
        for make_way in self.bars:
            make_way()


_row = _Row()


def show_text(text: str) -> None:
    """To stdout, at once."""
    with _row.lock:
        sys.stdout.write(text)
        sys.stdout.flush()
        if text:
            _row.begun = not text.endswith("\n")


def end_text() -> None:
    """The line break behind an answer, unless a row of the one terminal begins here anyway."""
    with _row.lock:
        if _row.begun or not one_terminal():
            show_text("\n")
        _row.ended = True


def note_interrupt() -> None:
    """Ctrl-C was typed, and the terminal shows that in the row where it was."""
    _row.begun = True


def tell(lines: str) -> None:
    """To stderr."""
    with _row.lock:
        _row.end()
        print(lines, file=sys.stderr, flush=True)


@contextlib.contextmanager
def making_way(make_way: Callable[[], object]) -> Iterator[None]:
    """Meanwhile call this before something is told."""
    _row.bars.append(make_way)
    try:
        yield
    finally:
        _row.bars.remove(make_way)


def tell_interrupt() -> None:
    """To stderr, that Ctrl-C has ended the program; an answer may have been ended just before."""
    if not _row.ended:
        note_interrupt()
    tell("interrupted")


class LogHandler(logging.Handler):
    """Tells log lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """One of them."""
        try:
            tell(self.format(record))
        except Exception:  # a log that cannot be written ends no answer
            self.handleError(record)


def one_terminal() -> bool:
    """Whether stdout and stderr are."""
    try:
        out, err = os.fstat(sys.stdout.fileno()), os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # closed, or none of the system's
        return False
    return sys.stdout.isatty() and os.path.samestat(out, err)
