"""A job of the scheduler: the tokens that the stages lack of a session, and its parts in batches."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cake.model.batch import Segment
from cake.session import Session

OnProgress = Callable[[int], object]


@dataclass(eq=False)
class Job:
    """The tokens that the stages lack of a session, and what to make of the last logits."""

    session: Session
    choice: Callable[[Tensor], Any]  # of logits `[wanted, vocab_size]`
    wanted: int
    on_progress: OnProgress
    chunk: int
    sent: int  # tokens of the session that are held or on their way
    done: "asyncio.Future[Any]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    source: int | None = None  # the session to copy before the first part
    attempt: int = 0  # what belongs to an earlier one is of no use any more
    replayed: bool = False
    losses: int = 0  # of stages, while it was on its way

    @property
    def missing(self) -> int:
        """Tokens that are still to be sent."""
        return len(self.session.ids) - self.sent

    def take(self, most: int) -> "Part | None":
        """The next at most `most` tokens; the last part has all rows whose logits are wanted."""
        length = min(self.missing, most)
        if 0 < self.missing - length < self.wanted:
            length = self.missing - self.wanted
        if not length:
            return None
        source, self.source = self.source, None
        self.sent += length
        return Part(self, self.sent - length, length, self.attempt, source)


@dataclass(frozen=True)
class Part:
    """A job's tokens in a batch: `length` of them from `position` on."""

    job: Job
    position: int
    length: int
    attempt: int
    source: int | None

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        return self.job.session.ids[self.position : self.position + self.length]

    @property
    def segment(self) -> Segment:
        """As the stages call it."""
        return Segment(self.job.session.number, self.position, self.length, self.source)

    @property
    def stale(self) -> bool:
        """Whether nobody waits for its result: the job is over, or was begun again."""
        return self.job.done.done() or self.attempt != self.job.attempt

    @property
    def last(self) -> bool:
        """Whether the job's tokens end with it."""
        return self.position + self.length == len(self.job.session.ids)


def choices(jobs: Sequence[Job]) -> Callable[[Tensor], list[tuple[Any, Exception | None]]]:
    """What each job makes of its logits, or how it failed: one's failure is not the others'."""

    def choose(logits: Tensor) -> list[tuple[Any, Exception | None]]:
        outcomes: list[tuple[Any, Exception | None]] = []
        end = 0
        for job in jobs:
            end += job.wanted
            try:
                outcomes.append((job.choice(logits[end - job.wanted : end]), None))
            except Exception as error:
                outcomes.append((None, error))
        return outcomes

    return choose
