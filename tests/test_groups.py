"""How many groups: on a made-up clock, with machines of which the test says how fast they are."""

from collections import Counter
from collections.abc import Callable

import pytest

from cake.groups import BETTER, LONGEST_REST, ROUNDS, Groups


class Machines:
    """Stages that make `speed(number of groups)` tokens a second."""

    def __init__(self, n_stages: int, speed: Callable[[int], float]) -> None:
        self.n_stages, self.speed = n_stages, speed
        self.now = 0.0
        self.groups = Groups(lambda: self.now)
        self.numbers: list[int] = []  # of each batch

    def generate(self, n_sessions: int, rounds: int) -> list[int]:
        """So many tokens of each session; the numbers of groups that travelled."""
        before, made = len(self.numbers), 0
        while made < rounds * n_sessions:
            number = self.groups.number(self.n_stages)
            share = -(-n_sessions // number)
            self.numbers.append(number)
            self.now += share / self.speed(number)
            made += share
            self.groups.came(share, n_sessions, self.n_stages)
        return self.numbers[before:]


def test_as_many_as_stages_before_anything_is_known() -> None:
    assert Groups().number(4) == 4
    assert Machines(4, lambda number: 1).generate(8, ROUNDS) == [4] * 4 * ROUNDS


@pytest.mark.parametrize("best", [1, 2, 3, 4])
def test_the_fastest_is_found_and_kept(best: int) -> None:
    machines = Machines(4, lambda number: 50 - 10 * abs(number - best))
    machines.generate(8, 100)
    used = Counter(machines.generate(8, 1000))
    assert used.most_common(1)[0][0] == best
    assert used[best] > 0.9 * used.total()
    assert set(used) == {1, 2, 3, 4}, "the others are tried now and then"


def test_a_difference_that_may_be_chance_changes_nothing() -> None:
    machines = Machines(2, lambda number: 10 if number == 2 else 10 * (BETTER - 0.01))
    machines.generate(8, 100)
    assert Counter(machines.generate(8, 500)).most_common(1)[0][0] == 2


def test_what_became_faster_is_noticed() -> None:
    machines = Machines(2, lambda number: 10 * number)
    machines.generate(8, 2000)
    machines.speed = lambda number: 10 / number
    machines.generate(8, 2 * (ROUNDS + 2) * LONGEST_REST)
    assert Counter(machines.generate(8, 500)).most_common(1)[0][0] == 1


def test_what_is_disturbed_is_not_compared() -> None:
    machines = Machines(2, lambda number: 10 / number)
    for _ in range(50):
        machines.generate(8, ROUNDS)
        machines.groups.disturbed()
    assert set(machines.numbers) == {2}


def test_numbers_of_sessions_that_change_are_not_compared() -> None:
    machines = Machines(2, lambda number: 10 / number)
    for n_sessions in range(2, 50):
        machines.generate(n_sessions, ROUNDS)
    assert set(machines.numbers) == {2}


@pytest.mark.parametrize(("n_stages", "n_sessions"), [(1, 8), (2, 1)])
def test_where_there_is_no_choice_none_is_tried(n_stages: int, n_sessions: int) -> None:
    assert set(Machines(n_stages, lambda number: 1 / number).generate(n_sessions, 500)) == {n_stages}


def test_a_stage_less_never_makes_more_groups_than_stages() -> None:
    machines = Machines(4, lambda number: 50 - 10 * abs(number - 3))
    machines.generate(8, 200)
    assert machines.groups.number(2) <= 2
