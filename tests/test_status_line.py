"""The chat's status line on a real terminal, drawn as a person sees it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminals import ROWS, Terminal

from cake.status_line import LastRow, cut, status_text

CHAT = (sys.executable, "-m", "cake", "--chat", "--threads", "1", "--temperature", "0", "--dtype", "float32")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


@pytest.fixture
def chat(demo_model: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started = []

    def start(*arguments: str, **streams: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        command = [*CHAT, "--model", str(demo_model), *arguments]
        started.append(subprocess.Popen(command, env=environment, start_new_session=True, **streams))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_person_sees_figures_below_the_answer_and_then_no_more(
    terminal: Terminal, chat: Callable[..., subprocess.Popen[bytes]]
) -> None:
    end = terminal.slave
    chat("--sample-len", "120", stdin=end, stdout=end, stderr=end)
    terminal.until(lambda: ">" in terminal.rows)
    terminal.type("Write a long poem about rain.\r")
    terminal.until(lambda: "tokens/s · first after 0." in terminal.last_row)
    assert "· master 0-29 up" in terminal.last_row
    terminal.until(lambda: terminal.last_row.endswith(" ms"))
    terminal.until(lambda: terminal.rows.count(">") == 1 and "120 tokens (" in terminal.text)
    assert "master 0-29 up" not in terminal.text
    assert terminal.screen.margins is None
    answer = terminal.text.split("poem about rain.")[1].split("120 tokens (")[0]
    assert len(answer.split()) > 60
    terminal.type("\x04")


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGTSTP])
def test_an_answer_that_is_stopped_takes_it_along(
    terminal: Terminal, chat: Callable[..., subprocess.Popen[bytes]], by: signal.Signals
) -> None:
    end = terminal.slave
    process = chat("--sample-len", "2000", stdin=subprocess.PIPE, stdout=end, stderr=end)
    assert process.stdin is not None
    process.stdin.write(b"Write a long poem about rain.\n")
    process.stdin.flush()
    terminal.until(lambda: terminal.last_row.endswith(" ms"))
    process.send_signal(by)
    terminal.until(lambda: "master 0-29 up" not in terminal.text)
    assert terminal.screen.margins is None
    if by == signal.SIGTSTP:
        process.send_signal(signal.SIGCONT)
        terminal.until(lambda: terminal.last_row.endswith(" ms"))
        process.send_signal(signal.SIGTERM)
        terminal.until(lambda: "master 0-29 up" not in terminal.text)
    process.stdin.close()
    process.stdin = None
    assert process.wait(20) == (0 if by == signal.SIGINT else -signal.SIGTERM)


def test_a_status_line_stays_out_of_what_is_piped(
    terminal: Terminal, chat: Callable[..., subprocess.Popen[bytes]]
) -> None:
    pipe = subprocess.PIPE
    process = chat("--sample-len", "60", stdin=pipe, stdout=pipe, stderr=terminal.slave)
    assert process.stdin is not None
    process.stdin.write(b"Write a long poem about rain.\n")
    process.stdin.flush()
    terminal.until(lambda: "· master 0-29 up" in terminal.last_row)
    terminal.until(lambda: "60 tokens (" in terminal.text)
    stdout, _ = process.communicate(timeout=60)
    assert stdout.count(b" ") > 20
    assert b"\x1b" not in stdout
    assert "master 0-29" not in terminal.text


def test_without_a_terminal_there_is_none(
    terminal: Terminal, chat: Callable[..., subprocess.Popen[bytes]]
) -> None:
    pipe = subprocess.PIPE
    process = chat("--sample-len", "60", stdin=pipe, stdout=terminal.slave, stderr=pipe)
    _, stderr = process.communicate(b"Write a long poem about rain.\n", timeout=60)
    assert b"60 tokens (" in stderr
    assert b"\x1b" not in stderr
    terminal.read()
    assert b"\x1b" not in terminal.seen


def test_what_is_written_at_the_bottom_scrolls_above_the_row(terminal: Terminal) -> None:
    with os.fdopen(os.dup(terminal.slave), "w") as stream:
        print(*(f"line {i}" for i in range(20)), sep="\n", end="\n", file=stream)
        stream.write("half a ")
        row = LastRow(stream)
        row.show("first")
        stream.write("sentence\n")
        print(*(f"more {i}" for i in range(20)), sep="\n", end="", file=stream)
        row.show("second")
        stream.flush()
        terminal.until(lambda: terminal.last_row == "second")
        assert terminal.rows[-2] == "more 19"
        assert "first" not in terminal.text
        row.erase()
        stream.write(" and\nthe end.")
        stream.flush()
        terminal.until(lambda: "the end." in terminal.text)
    assert terminal.rows[-2:] == ["more 19 and", "the end."]
    for kept in ("half a sentence", "line 0 ", "line 19", "more 0 "):
        assert terminal.text.count(kept) == 1


def test_a_terminal_that_is_made_larger_keeps_one_row(terminal: Terminal) -> None:
    with os.fdopen(os.dup(terminal.slave), "w") as stream:
        row = LastRow(stream)
        row.show("small")
        terminal.until(lambda: terminal.last_row == "small")
        terminal.resize(ROWS + 5)
        terminal.screen.resize(lines=ROWS + 5)
        row.show("large")
        terminal.until(lambda: terminal.last_row == "large")
        assert "small" not in terminal.text
        terminal.resize(3)
        row.show("no room")
        terminal.until(lambda: "large" not in terminal.text)
        assert "no room" not in terminal.text


@pytest.mark.parametrize("columns", [60, 100, 300])
def test_the_row_is_as_wide_as_the_terminal(columns: int) -> None:
    terminal = Terminal(columns)
    with os.fdopen(os.dup(terminal.slave), "w") as stream:
        LastRow(stream).show("0123456789" * 100)
        terminal.until(lambda: terminal.last_row.endswith("…"))
        assert terminal.last_row == ("0123456789" * 100)[: columns - 1] + "…"
    terminal.close()


def test_the_line_tells_what_everybody_does() -> None:
    stage = {"bytes_per_s": 0.0, "active": True}
    shown = {
        "nodes": [
            {"name": "master", "state": "up", "spans": [[0, 5]]},
            {"name": "attic", "state": "replaying", "spans": [[5, 6]]},
            {"name": "porch", "state": "lost", "spans": [[6, 30]]},
            {"name": "spare", "state": "standby", "spans": [[6, 30]]},
        ],
        "pipeline": [
            {**stage, "node": "master", "span": [0, 5], "compute_ms": 3.14, "network_ms": 0.0},
            {**stage, "node": "attic", "span": [5, 6], "compute_ms": 20.04, "network_ms": 0.44},
            {**stage, "node": "porch", "span": [6, 30], "compute_ms": None, "network_ms": None},
        ],
        "rates": {"tokens_per_s": 9.53},
    }
    assert status_text(shown, 0.314) == (
        "9.5 tokens/s · first after 0.31 s · master 0-4 up 3.1 ms · attic 5 replaying 20.0 + 0.4 ms"
        " · porch 6-29 lost · spare standby"
    )
    assert "first after -" in status_text(shown, None)


@pytest.mark.parametrize(
    ("text", "columns", "shown"),
    [
        ("abc", 3, "abc"),
        ("abcd", 3, "ab…"),
        ("日本語", 6, "日本語"),
        ("日本語", 5, "日本…"),
        ("日本語", 4, "日…"),
        ("a\x1b[2Jb", 9, "a?[2Jb"),
    ],
)
def test_no_more_is_shown_than_fits(text: str, columns: int, shown: str) -> None:
    assert cut(text, columns) == shown
