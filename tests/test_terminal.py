"""Answers and log lines on one terminal, and apart."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from terminals import Terminal

PROGRAM = """
import logging
from cake.command import set_up_output
from cake.terminal import show_text, tell

set_up_output(False, logging.WARNING)
log = logging.getLogger("cake.crew")
log.warning("early")
for text in ("The sky", " is bl", "", log, log, "ue.\\n", log, "It is"):
    if text is log:
        log.warning("lost a worker")
    else:
        show_text(text)
tell("told")
log.warning("late")
"""
ANSWER = "The sky is blue.\nIt is"
NEWS = ["early", "lost a worker", "lost a worker", "lost a worker", "told", "late"]


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def run(program: str = PROGRAM, **streams: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, text=True, env={**os.environ, "TERM": "xterm"}, **streams)


def without_time(row: str) -> str:
    """A log line as it was logged."""
    return row[9:] if row[2:3] == ":" else row


def test_a_log_line_in_the_middle_of_an_answer_has_a_row_of_its_own(terminal: Terminal) -> None:
    run(stdout=terminal.slave, stderr=terminal.slave)
    terminal.until(lambda: "late" in terminal.text)
    rows = [without_time(row) for row in terminal.rows if row]
    early, lost, _, again, told, late = NEWS
    assert rows == [early, "The sky is bl", lost, lost, "ue.", again, "It is", told, late]


def test_nothing_is_added_to_an_answer_that_is_piped(terminal: Terminal) -> None:
    assert run(stdout=subprocess.PIPE, stderr=terminal.slave).stdout == ANSWER
    terminal.until(lambda: "late" in terminal.text)
    assert [without_time(row) for row in terminal.rows if row] == NEWS


def test_nothing_is_added_to_an_answer_whose_log_is_piped(terminal: Terminal) -> None:
    ended = run(stdout=terminal.slave, stderr=subprocess.PIPE)
    assert [without_time(line) for line in ended.stderr.splitlines()] == NEWS
    terminal.until(lambda: "It is" in terminal.text)
    assert [row for row in terminal.rows if row] == ANSWER.splitlines()


@pytest.mark.parametrize("together", [False, True])
def test_without_a_terminal_nothing_is_added(together: bool) -> None:
    ended = run(stdout=subprocess.PIPE, stderr=subprocess.STDOUT if together else subprocess.PIPE)
    if together:
        assert ended.stdout.count("\n") == ANSWER.count("\n") + len(NEWS)
    else:
        assert ended.stdout == ANSWER


STREAMS = """
import logging, sys
from cake.command import set_up_output
from cake.terminal import show_text, tell

set_up_output(False, logging.WARNING)
show_text(repr(sys.stdin.readline()) + repr(sys.stdin.isatty()))
tell("told")
"""


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_stream_that_whoever_started_us_has_closed_is_empty(closed: int) -> None:
    command = [sys.executable, "-c", STREAMS]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    ended = subprocess.run(command, **streams, text=True, check=True, preexec_fn=lambda: os.close(closed))
    assert ended.stdout == ("" if closed == 1 else "''False")
    assert ended.stderr == ("" if closed == 2 else "told\n")


ENDS = """
import logging
from cake.command import set_up_output
from cake.terminal import end_text, note_interrupt, show_text, tell

set_up_output(False, logging.WARNING)
for text, late in (("one", ""), ("two\\n", ""), ("", ""), ("three", "lost a worker")):
    show_text(text)
    if late:
        logging.getLogger("cake.crew").warning(late)
    end_text()
    tell("told")
print("^C", end="", flush=True)
note_interrupt()
end_text()
tell("told")
"""


def test_an_answer_ends_with_one_line_break(terminal: Terminal) -> None:
    run(ENDS, stdout=terminal.slave, stderr=terminal.slave)
    terminal.until(lambda: terminal.text.count("told") == 5)
    rows = [without_time(row) for row in terminal.rows]
    assert rows[:10] == ["one", "told", "two", "told", "told", "three", "lost a worker", "told", "^C", "told"]
    piped = run(ENDS, stdout=subprocess.PIPE, stderr=subprocess.PIPE).stdout
    assert piped == "one\ntwo\n\n\nthree\n^C\n"


INTERRUPTED = """
from cake.command import errors_in_one_line
from cake.terminal import end_text, show_text

@errors_in_one_line
def command(debug):
    {before}
    print("^C", end="", flush=True)
    {after}
    raise KeyboardInterrupt

command(debug=False)
"""


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [("", "", ["^C"]), ("show_text('one')", "end_text()", ["one^C"]), ("show_text('one')", "", ["one^C"])],
)
def test_what_ctrl_c_ended_is_told_in_a_row_of_its_own(
    terminal: Terminal, before: str, after: str, shown: list[str]
) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        run(INTERRUPTED.format(before=before, after=after), stdout=terminal.slave, stderr=terminal.slave)
    terminal.until(lambda: "interrupted" in terminal.text)
    assert terminal.rows[:3] == [*shown, "interrupted", ""]


BARS = """
import logging
from cake.command import set_up_output
from cake.progress import loading_bar

set_up_output(False, logging.WARNING)
log = logging.getLogger("cake.crew")
with loading_bar(10) as bar:
    log.warning("too early for a bar")
    bar.start_t -= 3
    bar.last_print_t -= 3
    bar.update(5)
    log.warning("lost a worker")
    bar.update(1)
    bar.refresh()
    log.warning("lost another")
"""


def test_a_bar_makes_way_for_a_log_line(terminal: Terminal) -> None:
    run(BARS, stdout=terminal.slave, stderr=terminal.slave)
    terminal.until(lambda: "lost another" in terminal.text)
    rows = [without_time(row) for row in terminal.rows if row]
    assert rows == ["too early for a bar", "lost a worker", "lost another"]
    assert b"50%" in terminal.seen
    assert b"60%" in terminal.seen


CHAT = """
import asyncio, logging
from cake.chat import _Lines
from cake.command import set_up_output

def lose(buffer):
    if buffer.text[-1:] in ("x", "y"):
        logging.getLogger("cake.crew").warning("lost worker %s", buffer.text[-1])

async def ask():
    lines = _Lines()
    lines._prompt.default_buffer.on_text_changed += lose
    print("asked:", await lines.next())

set_up_output(False, logging.WARNING)
asyncio.run(ask())
"""


def test_a_log_line_appears_above_the_line_that_is_typed(terminal: Terminal) -> None:
    end = terminal.slave
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", CHAT], env=environment, stdin=end, stdout=end, stderr=end):
        terminal.until(lambda: ">" in terminal.rows)
        terminal.type("one x")
        terminal.until(lambda: "lost worker x" in terminal.text and "> one x" in terminal.rows)
        terminal.type(", y")
        terminal.until(lambda: "lost worker y" in terminal.text and "> one x, y" in terminal.rows)
        terminal.type("\r")
        terminal.until(lambda: "asked: one x, y" in terminal.text)
    rows = [without_time(row) for row in terminal.rows if row]
    assert rows == ["lost worker x", "lost worker y", "> one x, y", "asked: one x, y"]
