"""The generator: a prompt becomes tokens, and tokens become text, one piece at a time.

An async iterator that the terminal consumes; knows nothing of terminals, files or sockets.
"""

import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cake.chunks import FEW_TOKENS
from cake.errors import CakeError, PromptTooLongError, SetupError
from cake.figures import Figures
from cake.job import OnProgress, nobody, nothing
from cake.model.grammar import Grammars
from cake.model.sampling import Sampler, SamplingParams, Scores
from cake.model.tokenizer import Detokenizer, Tokenizer
from cake.passes import Made, Passes
from cake.pipeline import Pipeline
from cake.pool import SessionPool
from cake.scheduler import Scheduler
from cake.session import Session
from cake.speculation import Proposer, Speculation

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that it completes; the last one says why it is the last."""

    token: int
    text: str
    finish_reason: FinishReason | None = None
    proposed: int = 0  # tokens of which its pass decided; the pass's first piece tells
    accepted: bool = False  # whether it was one of them
    scores: Scores | None = None  # where the sampling asks for them


class Generator:
    """Answers prompts on a pipeline, any number of them at once."""

    def __init__(
        self,
        pipeline: Pipeline,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        prompt_chunk: int | None = None,
        new_proposer: Callable[[], Proposer] | None = None,
    ) -> None:
        self.pipeline, self.tokenizer = pipeline, tokenizer
        self.figures = Figures()
        self._stop_ids, self._scheduler = stop_ids, Scheduler(pipeline, prompt_chunk, self.figures)
        self.sessions = SessionPool(self.close_session)
        self._new_proposer = new_proposer
        self._speculations: dict[int, Speculation] = {}  # by the session's number

    @property
    def busy(self) -> bool:
        """Whether a batch is on its way through the pipeline."""
        return self._scheduler.busy

    @property
    def n_groups(self) -> int:
        """In how many batches the requests that generate travel, if there are enough."""
        return self._scheduler.n_groups

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Reads `SamplingParams.grammar`. The first use may take seconds: not in the event loop."""
        return Grammars(self.tokenizer, self._stop_ids)

    async def close_session(self, session: Session) -> None:
        """Free the session in every stage."""
        speculation = self._speculations.pop(session.number, None)
        if speculation is not None:
            await speculation.forget()
        await self.pipeline.forget(session.number)

    def check(self, prompt: Sequence[int]) -> None:
        """Raise `CakeError` unless the prompt is one that this pipeline can answer."""
        check_prompt(prompt, self.pipeline.context, self.pipeline.config.vocab_size)

    async def answer(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        on_progress: OnProgress = nobody,
        copies: bool = False,
    ) -> AsyncGenerator[Piece, None]:
        """As `generate`, when it is this request's turn, and in a session that is kept for others.

        With `copies` it begins with a copy of what another session holds, which others can copy too.
        `on_progress` is told of 0 tokens when its turn has come.
        """
        self.check(prompt)
        arrived_s = time.perf_counter()
        async with self.sessions.session_for(prompt, copies) as session:
            on_progress(0)
            pieces = self.generate(session, prompt, sampling, max_tokens, on_progress, arrived_s)
            # Its passes end before others get the session, also where somebody leaves early.
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    yield piece

    async def read(self, prompt: Sequence[int], on_progress: OnProgress = nobody) -> None:
        """Run a prompt of which several answers are wanted, and keep its session for them to copy."""
        self.check(prompt)
        async with self.sessions.session_for(prompt) as session:
            session.keep_prefix(prompt)
            self.figures.cached_tokens += session.held
            await self._scheduler.run(session, nothing, on_progress=self.figures.prompt(on_progress))

    async def generate(
        self,
        session: Session,
        prompt: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        on_progress: OnProgress = nobody,
        arrived_s: float | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Run the prompt and yield up to `max_tokens` tokens as they are made.

        `on_progress` is told how many tokens each part of the prompt had that was run.
        `arrived_s` is when it was asked for, on `time.perf_counter`'s clock, if that was before now.

        What the prompt shares with the session's tokens so far is not run again. Ends with the
        reason "stop" at one of the model's end tokens, with "length" at `max_tokens` or when the
        context is full.
        """
        self.check(prompt)
        session.keep_prefix(prompt)
        sampler, detokenizer = Sampler(sampling), Detokenizer(self.tokenizer)
        end = min(len(prompt) + max_tokens, self.pipeline.context)
        passes = Passes(self._scheduler, session, sampler, self._speculation(session), end)
        with contextlib.closing(passes), self.figures.answer(arrived_s) as figures:
            self.figures.cached_tokens += session.held
            made = await passes.first(self.figures.prompt(on_progress))
            while True:
                for piece in self._pieces(session, made, detokenizer, end):
                    figures.token()
                    yield replace(piece, scores=sampler.scores.popleft()) if sampler.scores else piece
                    if piece.finish_reason:
                        return
                made = await passes.next()

    def _pieces(self, session: Session, made: Made, detokenizer: Detokenizer, end: int) -> Iterator[Piece]:
        """Append what a pass made to the session, and to the text.

        One token after the other: whoever leaves in between has a session of what was given out.
        """
        for i, token in enumerate(made.tokens):
            session.ids.append(token)
            session.held = min(made.held, len(session.ids))
            text = detokenizer.add(token)
            reason: FinishReason | None = None
            if token in self._stop_ids:
                reason = "stop"
            elif len(session.ids) == end:
                reason = "length"
            if reason:
                text += detokenizer.finish()
            proposed = 0 if i else made.proposed
            yield Piece(token, text, reason, proposed, accepted=i < made.accepted)

    def _network_s(self) -> float:
        return self.pipeline.network_s

    def _speculation(self, session: Session) -> Speculation | None:
        """Who proposes for this session."""
        if self._new_proposer is None:
            return None
        if session.number not in self._speculations:
            most = min(FEW_TOKENS, self.pipeline.max_batch_tokens) - 1
            self._speculations[session.number] = Speculation(self._new_proposer(), most, self._network_s)
        return self._speculations[session.number]


def check_prompt(prompt: Sequence[int], context: int, vocab_size: int) -> None:
    """Raise `CakeError` unless the prompt leaves room for a token and the model knows its tokens."""
    if not prompt:
        raise CakeError("the prompt is empty; say something with --prompt")
    if max(prompt) >= vocab_size:
        raise SetupError(
            f"the tokenizer made the token {max(prompt)}, but the model knows only {vocab_size}; "
            "do its files belong together?"
        )
    if len(prompt) >= context:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens and the context holds {context}, one of them "
            "for the answer; shorten the prompt, or raise --context or, where memory is short, "
            "--cache-memory, here and on the workers"
        )
