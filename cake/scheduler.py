"""Continuous batching: many requests share one pipeline, and no stage waits while another works.

A request hands in a job: run what the stages do not hold of this session yet, and choose from the
last logits. Jobs join and leave with every batch. As many batches travel at once as there are stages,
each with its share of the sessions that generate: one clump of all of them would leave every stage
but one idle. Where fewer batches are seen to make more tokens, they are fewer (`cake.groups`). A prompt
goes in chunks, several on their way at once, so that the second stage works on the first chunk while
the first works on the second; the tokens of other sessions ride along.

Over slow links a session that generates need not wait for its tokens either: a job may follow another on
the assumption that it knows what that one will choose.

Knows nothing of text, and of sampling only as a function that it calls.
"""

import asyncio
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from cake.chunks import chunk_tokens
from cake.departures import Departure, Departures, Room
from cake.errors import NodeLostError, SessionLostError
from cake.figures import Figures
from cake.groups import Groups
from cake.job import Job, OnProgress, Part, choices, nobody
from cake.losses import Losses, Mendable, fail
from cake.model.batch import Segment
from cake.session import Session
from cake.turns import Turns

T = TypeVar("T")


class Stages(Room, Mendable, Protocol):
    """What the scheduler needs of a pipeline."""

    async def forward(
        self, ids: Sequence[int], segments: Sequence[Segment], until: Mapping[Hashable, int]
    ) -> Tensor: ...

    async def choose(self, hidden: Tensor, choice: Callable[[Tensor], T]) -> T: ...


class Scheduler:
    """Runs jobs in batches over a pipeline."""

    def __init__(
        self,
        pipeline: Stages,
        chunk: int | None = None,
        figures: Figures | None = None,
        groups: Groups | None = None,
    ) -> None:
        self._pipeline, self._chunk = pipeline, chunk
        self._departures = Departures(pipeline, groups or Groups())
        self._tasks: set[asyncio.Task[None]] = set()
        self._pumping = False
        self._turns = Turns(self._restart)
        self._losses = Losses(pipeline, self._turns, self._withdraw, self._restart, figures or Figures())

    @property
    def busy(self) -> bool:
        """Whether a batch is on its way."""
        return self._departures.under_way

    @property
    def n_groups(self) -> int:
        """In how many batches the sessions that generate travel, if there are enough."""
        return self._departures.n_groups

    async def run(
        self,
        session: Session,
        choice: Callable[[Tensor], T],
        proposals: Sequence[int] = (),
        on_progress: OnProgress = nobody,
    ) -> T:
        """As `start`, and what `choice` made."""
        result: T = await self.start(session, choice, proposals, on_progress).done
        return result

    def start(
        self,
        session: Session,
        choice: Callable[[Tensor], object],
        proposals: Sequence[int] = (),
        on_progress: OnProgress = nobody,
    ) -> Job:
        """Run the ids that the stages lack, and the proposals behind them.

        The job is done with what `choice` makes of the logits of the last id and of each proposal; it
        runs in the device's thread. Where a stage lost the session (it answers so) all stages get all ids
        again, once, and once more when one of the other sessions has made room. Where a stage itself is
        lost the pipeline is mended first, and those behind it get only what they lack. At most one job of
        a session at a time, but for those that follow it.
        """
        ids, wanted = [*session.ids, *proposals], len(proposals) + 1
        chunk = self._chunk_for(len(ids) - session.held, wanted)
        job = Job(session, ids, choice, wanted, on_progress, chunk, session.held, source=session.source)
        self._turns.begin(job)
        return job

    def follow(self, job: Job, tokens: Sequence[int], choice: Callable[[Tensor], object]) -> Job:
        """Run `tokens` after those of `job`, without waiting for its result, when it has been sent.

        `choice` gets their logits after `job`'s choice is made. The job that follows is done with None if
        it came to nothing because a stage lost something: start another.
        """
        ids, chunk = [*job.ids, *tokens], max(job.chunk, len(tokens))
        job.next = Job(job.session, ids, choice, len(tokens), nobody, chunk, len(job.ids), follows=True)
        if not job.missing:
            self._queue(job.next)
        return job.next

    def _chunk_for(self, n_tokens: int, wanted: int) -> int:
        chunk = self._chunk or chunk_tokens(n_tokens, self._pipeline.n_stages)
        return min(max(chunk, wanted), self._pipeline.max_batch_tokens)

    def _queue(self, job: Job) -> None:
        self._departures.add(job)
        self._pump_soon()

    def _pump_soon(self) -> None:
        """After what is ready to run has run: sessions whose tokens came together stay together."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping, queued = False, self._departures.jobs
        try:
            self._send_batches()
        except Exception as error:  # a mistake of our own: nobody shall wait for what is never sent
            self._give_up((*queued, *self._turns.jobs), error)

    def _give_up(self, jobs: Iterable[Job], error: Exception) -> None:
        """They end with this error, and those that come later can be run."""
        self._departures.clear()
        for job in jobs:
            job.fail_next()
            if not job.done.done():
                job.done.set_exception(error)

    def _send_batches(self) -> None:
        while departure := self._departures.next():
            task = asyncio.create_task(self._travel(departure))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            for job in [part.job.next for part in departure.parts if part.last]:
                if job is not None:
                    self._queue(job)

    async def _travel(self, departure: Departure) -> None:
        """Through the stages, then choose; whatever happens reaches those who wait."""
        parts = departure.parts
        try:
            try:
                await self._through(departure)
            except SessionLostError as error:
                self._losses.of_session(parts, error)
            except NodeLostError as error:
                await self._losses.of_stage(parts, error)
        except Exception as error:
            fail(parts, error)
        finally:  # when those who got a token have asked for the next
            asyncio.get_running_loop().call_soon(self._chosen, departure)

    async def _through(self, departure: Departure) -> None:
        parts = departure.parts
        batch = [token for part in parts for token in part.ids]
        segments = [part.segment for part in parts]
        until: dict[Hashable, int] = {
            part.job.session.number: part.until for part in parts if part.until is not None
        }
        try:
            hidden = await self._pipeline.forward(batch, segments, until)
        finally:  # before the head: the stages shall not wait for it
            self._departures.arrived(departure)
            self._pump_soon()
        await self._finish(parts, hidden)

    def _chosen(self, departure: Departure) -> None:
        self._departures.chosen(departure)
        self._pump()

    async def _finish(self, parts: Sequence[Part], hidden: Tensor) -> None:
        """Tell of progress, and let the jobs whose tokens end here choose."""
        jobs: list[Job] = []
        rows: list[int] = []
        end = 0
        for part in parts:
            end += part.length
            if part.stale:
                continue
            part.job.session.holds(part.position + part.length)
            if not part.job.replayed and part.until is None:
                part.job.on_progress(part.length)
            if part.last:
                jobs.append(part.job)
                rows += range(end - part.job.wanted, end)
        if not jobs:
            return
        for job, (result, error) in zip(
            jobs, await self._pipeline.choose(hidden[rows], choices(jobs)), strict=True
        ):
            if job.done.done():
                continue
            if error is None:
                job.done.set_result(result)
            else:
                job.done.set_exception(error)

    def _withdraw(self, job: Job) -> None:
        """What is on its way is of no use any more, and no more is sent."""
        job.fail_next()
        job.attempt += 1
        self._departures.remove(job)

    def _restart(self, job: Job) -> None:
        """From what the stages hold of it."""
        self._withdraw(job)
        job.sent, job.source = job.session.held, job.session.source
        job.chunk = self._chunk_for(job.missing, job.wanted)
        self._queue(job)
