"""Figures: what the master observes of its own work, counted since it began.

What each stage did is counted where it is done (`cake.stage_stats.StageStats`). Knows nothing of who looks at
figures, and costs a token about a microsecond.
"""

import bisect
import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence

from cake.job import OnProgress
from cake.news import News

FIRST_TOKEN_S = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2)
BETWEEN_TOKENS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6)


class Distribution:
    """How many of the values seen were at most each of the ascending `bounds`, or beyond the last."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0
        self.latest: float | None = None

    @property
    def n(self) -> int:
        """Values that were seen."""
        return sum(self.counts)

    @property
    def cumulative(self) -> list[tuple[str, int]]:
        """Each bound as text, and how many values were at most that; infinity comes last."""
        bounds = [*map(str, self.bounds), "+Inf"]
        return list(zip(bounds, itertools.accumulate(self.counts), strict=True))

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value
        self.latest = value


class Figures:
    """Answers, their tokens and times, and the sessions that are replayed."""

    def __init__(self) -> None:
        self.news = News()  # a replay begins or ends
        self.prompt_tokens = 0  # that were run
        self.cached_tokens = 0  # of prompts, that needed not to be run
        self.tokens = 0  # of answers
        self.answers = 0  # that were begun
        self.answering = 0  # at this moment
        self.replays = 0
        self.replaying: set[int] = set()  # numbers of sessions
        self.first_token_s = Distribution(FIRST_TOKEN_S)
        self.between_tokens_s = Distribution(BETWEEN_TOKENS_S)

    @contextlib.contextmanager
    def answer(self, arrived_s: float | None = None) -> "Iterator[AnswerFigures]":
        """Count an answer, asked for at `arrived_s` on `time.perf_counter`'s clock, if not now."""
        self.answers += 1
        self.answering += 1
        try:
            yield AnswerFigures(self, time.perf_counter() if arrived_s is None else arrived_s)
        finally:
            self.answering -= 1

    def prompt(self, on_progress: OnProgress) -> OnProgress:
        """The same, and the prompt's tokens are counted."""

        def count(n_tokens: int) -> None:
            self.prompt_tokens += n_tokens
            on_progress(n_tokens)

        return count

    def replay(self, session: int) -> None:
        """Stages are told again what they lack of a session."""
        self.replays += 1
        self.replaying.add(session)
        self.news.tell()

    def replayed(self, session: int) -> None:
        """They hold it again, or nobody waits for that any more."""
        self.replaying.discard(session)
        self.news.tell()


class AnswerFigures:
    """One answer's share in the figures."""

    def __init__(self, figures: Figures, arrived_s: float) -> None:
        self._figures, self._last_s, self._begun = figures, arrived_s, False

    def token(self) -> None:
        """One more is there."""
        now, figures = time.perf_counter(), self._figures
        figures.tokens += 1
        times = figures.between_tokens_s if self._begun else figures.first_token_s
        times.add(now - self._last_s)
        self._last_s, self._begun = now, True
