"""The relay's command: what it reads and what it answers."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from netsim import bit_rate, duration, link, obey
from relay import Relay

NETSIM = Path(__file__).parents[1] / "scripts" / "netsim.py"
FAR_TOO_LONG_S = 20


@pytest.mark.parametrize(
    ("text", "seconds"), [("20ms", 0.02), ("0.5s", 0.5), ("300us", 0.0003), ("0ms", 0.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "rate"), [("50mbit", 50e6), ("1.5gbit", 1.5e9), ("none", None)])
def test_rates(text: str, rate: float | None) -> None:
    assert bit_rate(text) == rate


@pytest.mark.parametrize("text", ["20", "ms", "-1ms", "20 ms", "20mbit", "1e3ms", "infms"])
def test_what_is_not_a_duration(text: str) -> None:
    with pytest.raises(click.BadParameter, match="20ms"):
        duration(text)


@pytest.mark.parametrize("text", ["0mbit", "50", "50MB", "-1mbit"])
def test_what_is_not_a_rate(text: str) -> None:
    with pytest.raises(click.BadParameter):
        bit_rate(text)


def test_links() -> None:
    assert link("127.0.0.1:0=[::1]:10128") == (("127.0.0.1", 0), ("::1", 10128))
    for wrong in ("127.0.0.1:0", "here=there", "=", "127.0.0.1:0="):
        with pytest.raises(click.BadParameter):
            link(wrong)


def test_commands_change_the_links_that_they_name() -> None:
    relays = [Relay(("127.0.0.1", 1)) for _ in range(2)]
    assert [answer["delay_ms"] for answer in obey("delay 40ms", relays)] == [40, 40]
    assert [(answer["link"], answer["rate_mbit"]) for answer in obey("rate 1 10mbit", relays)] == [(1, 10)]
    assert [relay.conditions.rate for relay in relays] == [None, 10e6]


@pytest.mark.parametrize(
    "line", ["", "cut 2", "cut 0 now", "cut first", "delay", "delay 0", "delay 0 40", "rate 0 0mbit", "melt"]
)
def test_what_is_not_a_command_is_said(line: str) -> None:
    relays = [Relay(("127.0.0.1", 1)) for _ in range(2)]
    (answer,) = obey(line, relays)
    assert answer["error"]


@contextmanager
def netsim(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """The command, running."""
    pipe, command = subprocess.PIPE, [sys.executable, str(NETSIM), *arguments]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def test_the_command_relays_obeys_and_ends() -> None:
    with netsim("--link", "127.0.0.1:0=127.0.0.1:1", "--to", "127.0.0.1:2", "--delay", "5ms") as process:
        assert process.stdin is not None
        links = [said(process), said(process)]
        assert [(each["link"], each["to"]) for each in links] == [(0, "127.0.0.1:2"), (1, "127.0.0.1:1")]
        for line, number, state in [("freeze 0", 0, "frozen"), ("thaw 0", 0, "open"), ("cut 1", 1, "cut")]:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            assert {"link": number, "state": state}.items() <= said(process).items()
        process.stdin.write("melt\n")
        process.stdin.close()  # which does not end it
        process.stdin = None
        assert "melt" in said(process)["error"]
        assert process.poll() is None
        if sys.platform != "win32":
            process.send_signal(signal.SIGTERM)
            _, stderr = process.communicate(timeout=FAR_TOO_LONG_S)
            assert (process.returncode, stderr) == (0, "")


def test_an_address_that_cannot_be_had_is_said_in_one_line() -> None:
    with netsim("--listen", "192.0.2.1:0", "--to", "127.0.0.1:2") as process:
        _, stderr = process.communicate(timeout=FAR_TOO_LONG_S)
        assert process.returncode == 1
        assert len(stderr.splitlines()) == 1
        assert "192.0.2.1:0" in stderr
