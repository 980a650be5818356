"""Texts that end an answer, wherever the tokens cut them."""

import pytest

from cake.api.stops import StopFinder


def read(finder: StopFinder, *pieces: str) -> list[str]:
    return [*(finder.feed(piece) for piece in pieces), finder.finish()]


def test_without_stops_all_passes_at_once() -> None:
    assert read(StopFinder([]), "a", "b") == ["a", "b", ""]


@pytest.mark.parametrize("pieces", [["one END two"], ["one E", "N", "D two"], list("one END two")])
def test_a_stop_is_found_wherever_it_is_cut(pieces: list[str]) -> None:
    finder = StopFinder(["END"])
    assert "".join(read(finder, *pieces)) == "one "
    assert finder.found


def test_what_only_began_as_a_stop_is_given_out() -> None:
    finder = StopFinder(["END", "xyz"])
    assert read(finder, "an E", "N", "x", "y") == ["an ", "", "EN", "", "xy"]
    assert not finder.found


def test_the_first_of_several_counts() -> None:
    assert "".join(read(StopFinder(["b", "ab"]), "xa", "b")) == "x"
