"""What travels next: jobs wait here, and leave in batches when the stages have room for one.

A batch has a share of the sessions that generate, those first that wait longest, and a chunk of the prompts
in order of arrival. Knows nothing of how a batch travels.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cake.chunks import CHUNK_BESIDE_OTHERS, FEW_TOKENS, SENT_AHEAD
from cake.groups import Groups
from cake.job import Job, Part


class Room(Protocol):
    """What this needs to know of a pipeline."""

    @property
    def n_stages(self) -> int: ...
    @property
    def max_batch_tokens(self) -> int: ...


@dataclass(frozen=True)
class Departure:
    """The parts of a batch, and how many of them, the first ones, are of sessions that generate."""

    parts: Sequence[Part]
    n_few: int

    @property
    def needs_room(self) -> bool:
        """Whether it is more than jobs that follow others."""
        return not all(part.job.follows for part in self.parts)

    @property
    def has_prompt(self) -> bool:
        """Whether it has a part of a prompt."""
        return len(self.parts) > self.n_few


class Departures:
    """Those who wait, and the numbers of those on their way."""

    def __init__(self, pipeline: Room, groups: Groups) -> None:
        self._pipeline, self._groups = pipeline, groups
        self._few: deque[Job] = deque()  # of sessions that generate
        self._prompts: deque[Job] = deque()
        self._away = 0  # sessions that generate and have not got their token yet
        self._choosing = 0  # those of them whose logits are there
        self._travelling = 0  # batches
        self._prompting = 0  # those of them with a part of a prompt

    @property
    def under_way(self) -> bool:
        """Whether a batch is."""
        return self._travelling > 0

    @property
    def jobs(self) -> Sequence[Job]:
        """Those who wait."""
        return (*self._few, *self._prompts)

    @property
    def n_groups(self) -> int:
        """In how many batches the sessions that generate travel, if there are enough."""
        return self._groups.number(self._pipeline.n_stages)

    def add(self, job: Job) -> None:
        """It waits from now on."""
        few = job.missing <= FEW_TOKENS and job.kept is None  # which go in one part
        (self._few if few else self._prompts).append(job)

    def remove(self, job: Job) -> None:
        """No more of a prompt is sent, if it is one."""
        if job in self._prompts:
            self._prompts.remove(job)

    def clear(self) -> None:
        """Nobody waits any more."""
        self._few.clear()
        self._prompts.clear()

    def next(self) -> Departure | None:
        """What leaves now, if the stages have room and anybody waits."""
        room = self._has_room()
        # Who sends a job after another knows that the stages have time for it: it needs no room.
        if not room and not (self._few and self._few[0].follows):
            return None
        few = self._take_few()
        beside = self._generating + len(few)
        prompt = self._take_prompt(sum(part.length for part in few), beside) if room else []
        if not few and not prompt:
            return None
        departure = Departure([*few, *prompt], len(few))
        self._away += len(few)
        self._travelling += departure.needs_room
        self._prompting += departure.has_prompt
        return departure

    def arrived(self, departure: Departure) -> None:
        """It has been through the stages, which have room for another."""
        self._travelling -= departure.needs_room
        self._prompting -= departure.has_prompt
        self._choosing += departure.n_few

    def chosen(self, departure: Departure) -> None:
        """Its sessions have their tokens, and have asked for the next."""
        self._choosing -= departure.n_few
        self._away -= departure.n_few
        if self._prompts or self._prompting:
            self._groups.disturbed()
        else:
            self._groups.came(departure.n_few, self._generating, self._pipeline.n_stages)

    @property
    def _generating(self) -> int:
        return len(self._few) + self._away

    @property
    def _at_once(self) -> int:
        """How many batches travel at once."""
        return self._pipeline.n_stages if self._prompts or self._prompting else self.n_groups

    @property
    def _share(self) -> int:
        """The sessions that generate, in each batch."""
        return -(-self._generating // self._at_once)

    def _has_room(self) -> bool:
        """Whether a batch may go. A lone prompt sends some ahead: on a slow link they are on their way."""
        for jobs in (self._few, self._prompts):
            while jobs and jobs[0].done.done():
                jobs.popleft()
        n_stages = self._pipeline.n_stages
        ahead = SENT_AHEAD if n_stages > 1 and not self._generating else 0
        if self._travelling >= self._at_once + ahead:
            return False
        # Of fewer groups than stages none goes while some who belong to it choose: they are to come together.
        return self._at_once == n_stages or not self._choosing or len(self._few) >= self._share

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
