"""The door: addresses, crowds, and how failures slow down those who come again."""

import asyncio
from collections.abc import Sequence

import pytest

from cake.errors import CakeError, ProtocolError
from cake.net.admission import MAX_PENDING, Admission, Failures, household, parse_networks

HALF = MAX_PENDING // 2


@pytest.mark.parametrize(
    ("allowed", "host", "may"),
    [
        ([], "203.0.113.5", True),
        (["192.168.1.0/24"], "192.168.1.77", True),
        (["192.168.1.0/24"], "192.168.2.77", False),
        (["192.168.1.0/24"], "127.0.0.1", False),
        (["192.168.1.20/24"], "192.168.1.77", True),
        (["10.0.0.1"], "10.0.0.1", True),
        (["10.0.0.1"], "10.0.0.2", False),
        (["10.0.0.1,10.0.0.2", "fd00::/8"], "10.0.0.2", True),
        (["10.0.0.1, 10.0.0.2", "fd00::/8"], "fd12::1", True),
        (["10.0.0.1"], "::ffff:10.0.0.1", True),
        (["fe80::/10"], "fe80::1%eth0", True),
        (["fd00::/8"], "10.0.0.1", False),
        (["10.0.0.1"], "", False),
    ],
)
def test_allowed_networks(allowed: Sequence[str], host: str, may: bool) -> None:
    assert Admission(parse_networks(allowed)).allows(host) == may


@pytest.mark.parametrize("text", ["laptop", "192.168.1.0/33", "", "10.0.0.1,"])
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(CakeError, match=r"^--allow: .*; write 192\.168\.1\.0/24"):
        parse_networks([text])


def test_what_counts_as_one_address() -> None:
    assert household("10.0.0.1") == household("::ffff:10.0.0.1") != household("10.0.0.2")
    assert household("fd00:1:2:3::1") == household("fd00:1:2:3:ffff::9%eth0") != household("fd00:1:2:4::1")


class Door(Admission):
    """Remembers who was dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped: list[object] = []

    def come(self, *visitors: object, host: str = "10.0.0.1") -> None:
        for visitor in visitors:
            self.enter(visitor, host, lambda v=visitor: self.dropped.append(v))


def test_the_oldest_gives_way() -> None:
    door = Door()
    door.come(*range(HALF))
    assert door.dropped == []
    door.come("new")
    assert door.dropped == [0]
    assert not door.waits(0)
    assert door.waits("new")


def test_an_address_with_many_does_not_drive_out_one_with_few() -> None:
    door = Door()
    door.come("good", host="10.0.0.2")
    door.come(*range(200), host="10.0.0.1")
    assert door.waits("good")
    assert door.dropped == list(range(200 - HALF + 1))


def test_those_who_have_begun_are_not_driven_out_by_those_who_have_not() -> None:
    door = Door()
    door.come("good")
    door.begins("good")
    door.come(*range(200))
    assert door.waits("good")


def test_those_who_stop_in_the_middle_do_not_keep_others_out() -> None:
    door = Door()
    for i in range(200):
        door.come(i)
        door.begins(i)
    door.come("good")
    assert door.waits("good")
    door.begins("good")
    assert door.waits("good")
    assert len([i for i in range(200) if door.waits(i)]) == HALF - 1


def test_those_who_have_failed_do_not_keep_places_in_the_middle() -> None:
    door = Door()
    for i in range(HALF):
        door.come(i)
        door.begins(i)
        door.fails(i)
    door.come("good")
    assert door.dropped == [0]
    door.begins("good")
    assert door.dropped == [0]


def test_who_is_in_is_dropped_no_more() -> None:
    door = Door()
    door.come("good")
    door.begins("good")
    door.leave("good")
    assert not door.waits("good")
    for i in range(200):
        door.come(i)
        door.begins(i)
    assert "good" not in door.dropped
    door.leave("good")  # and going is no error then
    door.begins("good")  # nor what comes after being dropped
    assert not door.waits("good")


def test_a_crowd_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    door = Door()
    for _ in range(2):
        door.come(*range(200))
        for i in range(200):
            door.leave(i)
    assert [record.getMessage()[:20] for record in caplog.records] == ["too many connections"] * 2


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        monkeypatch.setattr("cake.net.admission.asyncio.sleep", self.sleep)

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def failed(clock: Clock, times: int, host: str = "10.0.0.1") -> Failures:
    failures = Failures(clock)
    for _ in range(times):
        failures.add(host)
    return failures


@pytest.mark.parametrize(
    ("times", "pause"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2), (5, 4), (6, 4), (5000, 4)]
)
async def test_three_failures_slow_an_address_down(clock: Clock, times: int, pause: float) -> None:
    failures = failed(clock, times)
    assert failures.pause("10.0.0.1") == pause
    assert failures.pause("10.0.0.2") == 0
    await failures.turn("10.0.0.2")
    await failures.turn("10.0.0.1")
    assert clock.slept == ([pause] if pause else [])


async def test_those_who_come_at_once_are_judged_one_after_the_other(clock: Clock) -> None:
    failures = failed(clock, 3)
    results = await asyncio.gather(*(failures.turn("10.0.0.1") for _ in range(20)), return_exceptions=True)
    assert clock.slept == [1, 2, 3, 4]
    assert all(isinstance(result, ProtocolError) for result in results[4:])
    clock.now += 4
    await failures.turn("10.0.0.1")
    assert clock.slept[4:] == [1]


def test_failures_are_forgiven(clock: Clock) -> None:
    failures = failed(clock, 5)
    clock.now += 61
    assert failures.pause("10.0.0.1") == 0
    failures.add("10.0.0.1")
    assert failures.pause("10.0.0.1") == 0


def test_many_failures_are_few_lines(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures(clock)
    told = 0
    for _ in range(100):
        failures.add("10.0.0.1")
        told += failures.worth_a_line("10.0.0.1")
    assert told == 19
    assert [record.getMessage()[:31] for record in caplog.records] == ["10.0.0.1 was refused 20 times; "]
    failures.add("10.0.0.2")
    assert failures.worth_a_line("10.0.0.2")


def test_memory_of_failures_is_bounded(clock: Clock) -> None:
    failures = failed(clock, 3)
    for i in range(1024):
        failures.add(f"10.1.{i // 256}.{i % 256}")
    assert failures.pause("10.0.0.1") == 0
    assert len(failures._of) == 1024
