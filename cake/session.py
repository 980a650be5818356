"""A session on the master: the token ids of one sequence, and how they get into the stages."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from cake.errors import SessionLostError
from cake.model.batch import Segment
from cake.pipeline import Pipeline

OnProgress = Callable[[int], object]


@dataclass
class Session:
    """One sequence on the master: its token ids, and how many of them every stage holds."""

    ids: list[int] = field(default_factory=list)
    held: int = 0
    number: int = field(default_factory=itertools.count().__next__)  # unique in this process

    def keep_prefix(self, ids: Sequence[int]) -> None:
        """Become the sequence `ids`; what it shares with the old one need not be run again."""
        shared = 0
        while shared < min(self.held, len(ids) - 1) and self.ids[shared] == ids[shared]:
            shared += 1
        self.ids, self.held = list(ids), shared


async def advance(
    pipeline: Pipeline, session: Session, chunk: int, on_progress: OnProgress = lambda _: None
) -> Tensor:
    """Run the ids that the stages do not hold yet, `chunk` at a time; hidden state of the last.

    A stage that lost the session (it answers so) gets all ids again, once.
    """
    try:
        return await _run_missing(pipeline, session, chunk, on_progress)
    except SessionLostError:
        session.held = 0
        return await _run_missing(pipeline, session, chunk, lambda _: None)


async def _run_missing(pipeline: Pipeline, session: Session, chunk: int, on_progress: OnProgress) -> Tensor:
    chunk = min(chunk, pipeline.max_batch_tokens)
    for start in range(session.held, len(session.ids), chunk):
        ids = session.ids[start : start + chunk]
        hidden = await pipeline.forward(ids, [Segment(session.number, start, len(ids))])
        session.held = start + len(ids)
        on_progress(len(ids))
    return hidden[-1:]
