"""Warnings about processes that together take more threads than there are cores."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cake import neighbours
from cake.neighbours import announce_threads

ANNOUNCE = """
import sys
from pathlib import Path
from cake import neighbours
neighbours._folder = lambda: Path(sys.argv[1])
neighbours.announce_threads(int(sys.argv[2]), 4)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(neighbours, "_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def neighbour(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process, which takes three threads until its standard input ends."""
    command = [sys.executable, "-c", ANNOUNCE, str(folder), "3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def test_alone_nobody_is_warned() -> None:
    assert announce_threads(64, 4) is None
    assert announce_threads(64, 4) is None  # its own note is not another's


def test_threads_beyond_the_cores_are_named(neighbour: "subprocess.Popen[str]") -> None:
    assert announce_threads(1, 4) is None
    warning = announce_threads(2, 4)
    assert warning is not None
    assert "1 other Cake process on this machine computes with 3 threads, this one with 2" in warning
    assert "4 cores" in warning
    assert "--threads 2" in warning


def test_single_threads_do_not_disturb_one_another(folder: Path) -> None:
    (folder / str(os.getppid())).write_text("1")
    assert announce_threads(1, 1) is None
    assert announce_threads(2, 1) is not None


def test_a_process_that_ended_does_not_count(folder: Path, neighbour: "subprocess.Popen[str]") -> None:
    note = folder / str(neighbour.pid)
    assert note.read_text() == "3"
    neighbour.kill()
    neighbour.wait()
    assert announce_threads(4, 4) is None
    assert not note.exists()


def test_what_is_no_note_is_left_alone(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / str(os.getppid())).write_text("many")
    assert announce_threads(4, 4) is None
    assert (folder / "notes.txt").read_text() == "mine"
