"""The passes of one answer: each verifies what was proposed, and others follow while it is on its way.

Over a slow network a pass is away for long, and the stages have nothing to do. Passes that follow assume
that it chooses what was proposed and go on behind that. Where it chooses otherwise they are dropped: what
they left in the stages lies beyond the right tokens, and the next pass makes the stages forget it.

Knows nothing of text; how many passes are worth it is the business of `cake.speculation`.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from cake.job import Job, OnProgress, nobody
from cake.model.sampling import Sampler
from cake.scheduler import Scheduler
from cake.session import Session
from cake.speculation import Speculation


@dataclass(frozen=True)
class Made:
    """The tokens that a pass made; the first `accepted` of them had been proposed."""

    tokens: list[int]
    proposed: int
    accepted: int
    held: int  # the session's tokens that the stages hold, these included


@dataclass(eq=False)
class Pass:
    """On its way: `ids`, of which the stages lack the end, and the proposals behind them."""

    ids: list[int]
    proposals: list[int]
    started_s: float
    after: "Pass | None" = None  # the one that it follows, until it has chosen
    assumed: list[int] | None = None  # what this one is to choose, if another follows it
    chosen: list[int] = field(default_factory=list)
    seconds: float = 0.0
    job: Job = field(init=False)

    def choice(self, sampler: Sampler, clock: Callable[[], float]) -> Callable[[Tensor], list[int] | None]:
        """What to make of the logits, in the order of the passes; None where it is of no use."""

        def choose(logits: Tensor) -> list[int] | None:
            after, self.after = self.after, None
            if after is not None and after.chosen != after.assumed:
                return None  # and no random number is drawn for nothing
            self.chosen = sampler.verify(logits, self.ids, self.proposals)
            self.seconds = clock() - self.started_s
            return self.chosen

        return choose

    @property
    def n_right(self) -> int:
        """How many of the proposals it chose."""
        return len(self.chosen) - 1

    @property
    def guesses(self) -> list[int]:
        """What it finds out about."""
        return self.proposals if self.assumed is None else self.assumed


class Passes:
    """Runs the passes of an answer that is to end where the session has `end` tokens."""

    def __init__(
        self,
        scheduler: Scheduler,
        session: Session,
        sampler: Sampler,
        speculation: Speculation | None,
        end: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._scheduler, self._session, self._sampler = scheduler, session, sampler
        self._speculation, self._end, self._clock = speculation, end, clock
        self._away: deque[Pass] = deque()
        self._begun = False

    async def first(self, on_progress: OnProgress) -> Made:
        """Run the prompt; there are no proposals yet."""
        self._start([], self._clock(), on_progress)
        await self._away[0].job.done
        return self._arrived(self._away.popleft())

    async def next(self) -> Made:
        """What the next pass made, of a session to which the tokens of those before were added."""
        while True:
            if not self._away:
                await self._propose()
            await self._follow()
            if await self._away[0].job.done is not None:
                this = self._away.popleft()
                if self._speculation is not None:
                    alone = not this.job.follows
                    self._speculation.learn(len(this.proposals), this.n_right, this.seconds, alone)
                return self._arrived(this)
            self.close()  # a stage lost what it follows

    def close(self) -> None:
        """Wait for none of those that are away any more."""
        for each in self._away:
            if not each.job.done.cancel() and not each.job.done.cancelled():
                each.job.done.exception()  # nobody else looks at it
        self._away.clear()

    async def _propose(self) -> None:
        """Send a pass that assumes nothing, with proposals if there is somebody who makes them."""
        speculation, ids = self._speculation, self._session.ids
        if speculation is None:
            self._start([], self._clock())
            return
        if not self._begun:  # only now, so that the first token has not had to wait for it
            await speculation.begin(ids)
            self._begun = True
        started_s, most = self._clock(), min(speculation.best(), self._end - len(ids) - 1)
        self._start(await speculation.propose(ids, 0, most, self._sampler), started_s)

    def _start(self, proposals: list[int], started_s: float, on_progress: OnProgress = nobody) -> None:
        this = Pass(self._session.ids, proposals, started_s)
        choose = this.choice(self._sampler, self._clock)
        this.job = self._scheduler.start(self._session, choose, proposals, on_progress)
        self._away.append(this)

    async def _follow(self) -> None:
        """Send passes behind those that are away, as many as are worth it."""
        while self._speculation is not None and not self._away[0].job.done.done():
            started_s, ids = self._clock(), self._away[-1].job.ids
            best, assumed = self._speculation.best(), len(ids) - len(self._session.ids)
            most = min(best + 1, self._end - len(ids) - 1)
            if len(self._away) >= self._speculation.passes(best) or most <= 0:
                return
            guesses = await self._speculation.propose(ids, assumed, most, self._sampler)
            if not guesses:
                return
            self._send_after(self._away[-1], guesses, started_s)

    def _send_after(self, last: Pass, guesses: list[int], started_s: float) -> None:
        """A pass behind the last one, the first of the guesses being what that one chooses in the end."""
        last.assumed = [*last.proposals, guesses[0]]
        this = Pass([*last.job.ids, guesses[0]], guesses[1:], started_s, after=last)
        this.job = self._scheduler.follow(last.job, guesses, this.choice(self._sampler, self._clock))
        self._away.append(this)

    def _arrived(self, this: Pass) -> Made:
        """What a pass made; those behind it are dropped if it was not what they assume."""
        proposed, accepted = len(this.guesses), this.n_right
        if this.chosen == this.assumed:
            accepted += 1
        else:
            proposed += sum(len(each.guesses) for each in self._away)
            self.close()
        return Made(this.chosen, proposed, accepted, len(this.ids) + this.n_right)
