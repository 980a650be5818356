"""What becomes of jobs on their way when a stage lost their session, or is lost itself.

Their tokens are sent again, as far as there is hope. Knows nothing of batches, nor of which job goes when.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from cake.errors import NodeLostError, SessionLostError
from cake.figures import Figures
from cake.job import Job, Part
from cake.session import Session
from cake.turns import Turns

MOST_LOSSES = 8  # of stages, in one job: a request that kills whoever computes it shall end


class Mendable(Protocol):
    """What there is to ask of a pipeline that lost something."""

    def lacking(self, session: Hashable) -> int | None: ...

    async def mend(self) -> None: ...


class Losses:
    """Sends jobs again, by calling `restart`, or holds them back after `withdraw`."""

    def __init__(
        self,
        pipeline: Mendable,
        turns: Turns,
        withdraw: Callable[[Job], object],
        restart: Callable[[Job], object],
        figures: Figures,
    ) -> None:
        self._pipeline, self._turns, self._figures = pipeline, turns, figures
        self._withdraw, self._restart = withdraw, restart

    def of_session(self, parts: Sequence[Part], error: SessionLostError) -> None:
        """A stage lost a session and did nothing: send that from its beginning, the others as before.

        A replay for those alone that came in the place of lost ones does not count: others may have lost it.
        """
        named = {part.job.session.number for part in parts} & {error.session}
        for part in parts:
            job = part.job
            if part.stale:
                continue
            job.fail_next()
            lost = not named or job.session.number == error.session  # who names none has lost all
            again = lost and self._lose(job.session)
            anew = lost and job.session.kept is None
            if job.follows:
                job.done.set_result(None)
            elif again and self._turns.wait(job):
                self._withdraw(job)
                job.replayed = False
            elif anew and job.replayed:
                job.done.set_exception(error)
            else:
                if lost:
                    self._replay(job)
                job.replayed = job.replayed or anew
                self._restart(job)

    def _replay(self, job: Job) -> None:
        """It counts until its tokens have been chosen: the stages hold the session then."""
        number = job.session.number
        self._figures.replay(number)
        job.done.add_done_callback(lambda _: self._figures.replayed(number))

    def _lose(self, session: Session) -> bool:
        """Whether the stages lose it again and again."""
        block = self._pipeline.lacking(session.number)
        if block is None:
            return session.lose()
        session.lose_before(block)
        return False

    async def of_stage(self, parts: Sequence[Part], error: NodeLostError) -> None:
        """A stage is gone. When its blocks are served again, send what was on its way once more.

        Whoever serves them may hold nothing of a session; the others hold what they held.
        """
        for part in parts:
            if not part.stale:
                part.job.losses += 1
                part.job.fail_next()
        fail([part for part in parts if part.job.losses > MOST_LOSSES], error)
        try:
            await self._pipeline.mend()
        except NodeLostError as hopeless:
            fail(parts, hopeless)
        for part in parts:
            if part.stale:
                continue
            if part.job.follows:
                part.job.done.set_result(None)
                continue
            part.job.replayed = False
            self._restart(part.job)


def fail(parts: Sequence[Part], error: Exception) -> None:
    """Their jobs end with this error, but for those that have begun anew."""
    for part in parts:
        if not part.stale:
            part.job.done.set_exception(error)
