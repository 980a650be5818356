"""In how many groups the sessions that generate travel through the stages.

As many groups as stages keep every stage busy. But each group is a pass through all weights, and where it is
reading them that takes the time, fewer passes can make more tokens: if one stage is far slower than the
others, which then wait for it anyway, or if stages share one memory. Which it is depends on machines,
weights and sessions; so it is measured, a few tokens long and now and then again.
"""

import time
from collections.abc import Callable

ROUNDS = 4  # tokens of each session from one look at the clock to the next
BETTER = 1.04  # times as fast: less may be chance
SHORTEST_REST, LONGEST_REST = 4, 64  # measurements before another number is tried again


class Groups:
    """How many, as the speed of those before has shown."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._best: int | None = None  # as many as stages until another number was faster
        self._tried: int | None = None
        self._tried_last = 0
        self._best_speed = 0.0
        self._rest, self._next_rest = 0, SHORTEST_REST
        self._sessions = self._tokens = 0
        self._began: float | None = None

    def number(self, n_stages: int) -> int:
        """For a pipeline of so many stages."""
        return min(self._tried or self._best or n_stages, n_stages)

    def came(self, n_tokens: int, n_sessions: int, n_stages: int) -> None:
        """A group's tokens are there, while so many sessions generate and nothing else is under way."""
        if n_sessions != self._sessions:
            self._sessions, self._tried = n_sessions, None
            self.disturbed()
        if n_sessions < 2 or n_stages < 2:
            return
        self._tokens += n_tokens
        if self._began is None:  # the first round may have been on its way in other groups
            if self._tokens >= 2 * n_sessions:
                self._tokens, self._began = 0, self._clock()
        elif self._tokens >= ROUNDS * n_sessions:
            self._compare(self._tokens / (self._clock() - self._began), n_stages)
            self.disturbed()

    def disturbed(self) -> None:
        """Something else was under way: what was measured so far says nothing."""
        self._tokens, self._began = 0, None

    def _compare(self, speed: float, n_stages: int) -> None:
        if self._tried is None:
            self._best_speed = speed
            self._rest -= 1
            if self._rest < 0:
                self._tried = self._tried_last = self._another(n_stages)
            return
        if speed > BETTER * self._best_speed:
            self._best, self._next_rest = self._tried, SHORTEST_REST
        self._rest, self._tried = self._next_rest, None
        self._next_rest = min(2 * self._next_rest, LONGEST_REST)

    def _another(self, n_stages: int) -> int:
        """The next number in turn that is not the best one."""
        number = self._tried_last % n_stages + 1
        return number if number != self.number(n_stages) else number % n_stages + 1
