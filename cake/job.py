"""A job of the scheduler: the tokens that the stages lack of a session, and its parts in batches.

One may follow another of its session before that one has its result: its tokens come after those, as long
as what is chosen turns out as assumed.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cake.model.batch import Segment
from cake.session import Kept, Session

OnProgress = Callable[[int], object]


def nobody(n_tokens: int) -> None:
    """Who is told of progress when nobody wants to know."""


def nothing(logits: Tensor) -> None:
    """What is chosen at the end of a prompt that is only read."""


@dataclass(eq=False)
class Job:
    """The tokens that the stages lack of a session, and what to make of the last logits."""

    session: Session
    ids: list[int]  # the session's, and behind them what is only proposed
    choice: Callable[[Tensor], Any]  # of logits `[wanted, vocab_size]`
    wanted: int
    on_progress: OnProgress
    chunk: int
    sent: int  # of the ids, those that are held or on their way
    done: "asyncio.Future[Any]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    source: int | None = None  # the session to copy before the first part
    attempt: int = 0  # what belongs to an earlier one is of no use any more
    replayed: bool = False
    losses: int = 0  # of stages, while it was on its way
    follows: bool = False  # another job, of which it is not known yet whether its result is as assumed
    next: "Job | None" = None  # the one that follows this one

    @property
    def missing(self) -> int:
        """Tokens that are still to be sent."""
        return len(self.ids) - self.sent

    @property
    def kept(self) -> Kept | None:
        """By stages that need not run the next tokens again."""
        kept = self.session.kept
        return kept if kept is not None and self.sent < kept.n_tokens else None

    def take(self, most: int) -> "Part | None":
        """The next at most `most` tokens; the last part has all rows whose logits are wanted.

        A part is either for all stages, or for none of those that hold its tokens still.
        """
        length, kept = min(self.missing, most), self.kept
        if 0 < self.missing - length < self.wanted:
            length = self.missing - self.wanted
        if kept is not None:
            length = min(length, kept.n_tokens - self.sent)
        if not length:
            return None
        source, self.source = self.source, None
        self.sent += length
        block = kept.block if kept else None
        return Part(self, self.sent - length, length, self.attempt, source, block)

    def fail_next(self) -> None:
        """Nothing comes of those that follow: this one was not run when they were."""
        job, self.next = self.next, None
        while job is not None:
            if not job.done.done():
                job.done.set_result(None)
            job = job.next


@dataclass(frozen=True)
class Part:
    """A job's tokens in a batch: `length` of them from `position` on."""

    job: Job
    position: int
    length: int
    attempt: int
    source: int | None
    until: int | None  # the block before which it ends, if that is not behind the last

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        return self.job.ids[self.position : self.position + self.length]

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
        return self.position + self.length == len(self.job.ids)


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
