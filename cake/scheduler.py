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
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from cake.chunks import CHUNK_BESIDE_OTHERS, FEW_TOKENS, SENT_AHEAD, chunk_tokens
from cake.errors import NodeLostError, SessionLostError
from cake.figures import Figures
from cake.groups import Groups
from cake.job import Job, OnProgress, Part, choices, nobody
from cake.losses import Losses, Mendable, fail
from cake.model.batch import Segment
from cake.session import Session
from cake.turns import Turns

T = TypeVar("T")


class Stages(Mendable, Protocol):
    """What the scheduler needs of a pipeline."""

    @property
    def n_stages(self) -> int: ...
    @property
    def max_batch_tokens(self) -> int: ...

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
        self._pipeline, self._chunk, self._groups = pipeline, chunk, groups or Groups()
        self._few: deque[Job] = deque()  # of sessions that generate
        self._prompts: deque[Job] = deque()
        self._away = 0  # sessions that generate and have not got their token yet
        self._choosing = 0  # those of them whose logits are there
        self._travelling = 0  # batches
        self._prompting = 0  # those of them with a part of a prompt
        self._tasks: set[asyncio.Task[None]] = set()
        self._pumping = False
        self._turns = Turns(self._restart)
        self._losses = Losses(pipeline, self._turns, self._withdraw, self._restart, figures or Figures())

    @property
    def busy(self) -> bool:
        """Whether a batch is on its way."""
        return self._travelling > 0

    @property
    def n_groups(self) -> int:
        """In how many batches the sessions that generate travel, if there are enough."""
        return self._groups.number(self._depth)

    @property
    def _depth(self) -> int:
        return self._pipeline.n_stages

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
        chunk = self._chunk or chunk_tokens(n_tokens, self._depth)
        return min(max(chunk, wanted), self._pipeline.max_batch_tokens)

    def _queue(self, job: Job) -> None:
        few = job.missing <= FEW_TOKENS and job.kept is None  # which go in one part
        (self._few if few else self._prompts).append(job)
        self._pump_soon()

    def _pump_soon(self) -> None:
        """After what is ready to run has run: sessions whose tokens came together stay together."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping, queued = False, (*self._few, *self._prompts)
        try:
            self._send_batches()
        except Exception as error:  # a mistake of our own: nobody shall wait for what is never sent
            self._give_up((*queued, *self._turns.jobs), error)

    def _give_up(self, jobs: Iterable[Job], error: Exception) -> None:
        """They end with this error, and those that come later can be run."""
        self._few.clear()
        self._prompts.clear()
        for job in jobs:
            job.fail_next()
            if not job.done.done():
                job.done.set_exception(error)

    def _send_batches(self) -> None:
        # Who sends a job after another knows that the stages have time for it: it needs no room.
        while (room := self._has_room()) or (self._few and self._few[0].follows):
            few = self._take_few()
            beside = self._generating + len(few)
            parts = few + (self._take_prompt(sum(part.length for part in few), beside) if room else [])
            if not parts:
                return
            self._away += len(few)
            task = asyncio.create_task(self._travel(parts, len(few)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self._travelling += _needs_room(parts)
            self._prompting += len(parts) > len(few)
            for job in [part.job.next for part in parts if part.last]:
                if job is not None:
                    self._queue(job)

    @property
    def _generating(self) -> int:
        return len(self._few) + self._away

    @property
    def _at_once(self) -> int:
        """How many batches travel at once."""
        return self._depth if self._prompts or self._prompting else self.n_groups

    @property
    def _share(self) -> int:
        """The sessions that generate, in each batch."""
        return -(-self._generating // self._at_once)

    def _has_room(self) -> bool:
        """Whether a batch may go. A lone prompt sends some ahead: on a slow link they are on their way."""
        for jobs in (self._few, self._prompts):
            while jobs and jobs[0].done.done():
                jobs.popleft()
        ahead = SENT_AHEAD if self._depth > 1 and not self._generating else 0
        if self._travelling >= self._at_once + ahead:
            return False
        # Of fewer groups than stages none goes while some who belong to it choose: they are to come together.
        return self._at_once == self._depth or not self._choosing or len(self._few) >= self._share

    def _take_few(self) -> list[Part]:
        """A share of the sessions that generate, those first that wait longest."""
        share = self._share
        parts: list[Part] = []
        room = self._pipeline.max_batch_tokens
        while self._few and len(parts) < share and self._few[0].missing <= room:
            job = self._few.popleft()
            if not job.done.done() and (part := job.take(room)):
                parts.append(part)
                room -= part.length
        return parts

    def _take_prompt(self, taken: int, generating: int) -> list[Part]:
        """A chunk of the prompts, in order of arrival; a small one while others are `generating`.

        None for the moment in which others choose: their next tokens shall ride along.
        """
        parts: list[Part] = []
        if self._choosing:
            return parts
        room = min(job.chunk for job in self._prompts) if self._prompts else 0
        if generating:
            room = min(room, CHUNK_BESIDE_OTHERS)
        room = min(room, self._pipeline.max_batch_tokens - taken)
        while self._prompts and room > 0:
            job = self._prompts[0]
            if not job.done.done():
                part = job.take(room)
                if part is None:
                    break
                parts.append(part)
                room -= part.length
            if job.missing and not job.done.done():
                break
            self._prompts.popleft()
        return parts

    async def _travel(self, parts: list[Part], n_few: int) -> None:
        """Through the stages, then choose; whatever happens reaches those who wait."""
        try:
            try:
                await self._through(parts, n_few)
            except SessionLostError as error:
                self._losses.of_session(parts, error)
            except NodeLostError as error:
                await self._losses.of_stage(parts, error)
        except Exception as error:
            fail(parts, error)
        finally:  # when those who got a token have asked for the next
            asyncio.get_running_loop().call_soon(self._chosen, n_few)

    async def _through(self, parts: list[Part], n_few: int) -> None:
        batch = [token for part in parts for token in part.ids]
        segments = [part.segment for part in parts]
        until: dict[Hashable, int] = {
            part.job.session.number: part.until for part in parts if part.until is not None
        }
        try:
            hidden = await self._pipeline.forward(batch, segments, until)
        finally:  # before the head: the stages shall not wait for it
            self._travelling -= _needs_room(parts)
            self._prompting -= len(parts) > n_few
            self._choosing += n_few
            self._pump_soon()
        await self._finish(parts, hidden)

    def _chosen(self, n_few: int) -> None:
        self._choosing -= n_few
        self._away -= n_few
        if self._prompts or self._prompting:
            self._groups.disturbed()
        else:
            self._groups.came(n_few, self._generating, self._depth)
        self._pump()

    async def _finish(self, parts: list[Part], hidden: Tensor) -> None:
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
        if job in self._prompts:
            self._prompts.remove(job)

    def _restart(self, job: Job) -> None:
        """From what the stages hold of it."""
        self._withdraw(job)
        job.sent, job.source = job.session.held, job.session.source
        job.chunk = self._chunk_for(job.missing, job.wanted)
        self._queue(job)


def _needs_room(parts: Sequence[Part]) -> bool:
    """Whether a batch is more than jobs that follow others."""
    return not all(part.job.follows for part in parts)
