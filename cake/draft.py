"""A draft model: a small model on the master that guesses what the large one will say.

It has a pipeline of its own, of blocks that all run here, and a session for each session of the large
model. By the rule that sessions are addressed by position, a rejected guess is overwritten, and what
was accepted is not run again.
"""

from collections.abc import Callable, Sequence

from cake.budget import CacheBudget
from cake.device import DeviceThread
from cake.dialling import Patience
from cake.errors import CakeError
from cake.job import nothing
from cake.model.sampling import Sampler
from cake.model.tokenizer import Tokenizer
from cake.pipeline import Pipeline, open_pipeline
from cake.scheduler import Scheduler
from cake.session import Session
from cake.topology import Topology
from cake.weights.checkpoint import Checkpoint, open_checkpoint


def open_draft_checkpoint(model: str, target: Checkpoint, tokenizer: Tokenizer) -> Checkpoint:
    """What `--draft-model` names. Raises `CakeError` unless its tokens are those of the `target`."""
    draft = open_checkpoint(model, lambda name: True)
    same_size = draft.config.vocab_size == target.config.vocab_size
    if not same_size or Tokenizer(draft.folder).vocabulary != tokenizer.vocabulary:
        raise CakeError(
            f"--draft-model {draft.name} has another vocabulary than {target.name}; it must be a smaller "
            "model of the same family"
        )
    return draft


class DraftModel:
    """A loaded draft model, which proposes for any number of sessions."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.scheduler = pipeline, Scheduler(pipeline)

    @classmethod
    async def load(
        cls,
        checkpoint: Checkpoint,
        thread: DeviceThread,
        context: int,
        on_bytes: Callable[[int], object],
        budget: CacheBudget,
    ) -> "DraftModel":
        """Load it all, to compute in `thread`, which the caller closes."""
        context = min(context, checkpoint.config.context)
        pipeline = await open_pipeline(
            checkpoint, Topology({}), thread, context, Patience(), on_bytes, budget=budget
        )
        return cls(pipeline)

    def proposer(self) -> "Drafter":
        """For a new session."""
        return Drafter(self)


class Drafter:
    """Proposes for one session what the draft model would say."""

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self._session = Session()
        self._agreed = 0  # tokens that this session certainly shares with the one it is for
        self._guesser: Sampler | None = None

    async def begin(self, ids: Sequence[int]) -> None:
        """Run the prompt; the last token waits for the first proposal."""
        if len(ids) >= self._model.pipeline.context:
            return
        self._session.keep_prefix(ids[:-1])
        self._agreed = len(ids) - 1
        await self._model.scheduler.run(self._session, nothing)

    async def propose(self, ids: Sequence[int], assumed: int, most: int, sampler: Sampler) -> list[int]:
        """Drawn one after the other from the draft's own odds, with the numbers `sampler` will draw."""
        most = min(most, self._model.pipeline.context - len(ids))
        if most <= 0:
            return []
        self._follow(ids, assumed)
        if not assumed or self._guesser is None:  # else its next number is the right one already
            self._guesser = sampler.twin()
        session, guesser = self._session, self._guesser
        for _ in range(most):
            token = await self._model.scheduler.run(
                session, lambda logits: guesser.sample(logits[-1], session.ids)
            )
            session.ids.append(token)
        return session.ids[len(ids) :]

    async def forget(self) -> None:
        """Free its session."""
        await self._model.pipeline.forget(self._session.number)

    def _follow(self, ids: Sequence[int], assumed: int) -> None:
        """Become the sequence `ids`, by a look at the new tokens only."""
        own, shared = self._session, self._agreed
        while shared < min(own.held, len(ids) - 1) and own.ids[shared] == ids[shared]:
            shared += 1
        own.cut(shared)
        own.ids += ids[shared:]
        self._agreed = len(ids) - assumed
