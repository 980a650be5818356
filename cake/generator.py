"""The generator: a prompt becomes tokens, and tokens become text, one piece at a time.

An async iterator that the terminal consumes; knows nothing of terminals, files or sockets.
"""

import functools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cake.errors import CakeError, PromptTooLongError
from cake.model.sampling import Sampler, SamplingParams
from cake.model.tokenizer import Detokenizer, Tokenizer
from cake.pipeline import Pipeline
from cake.scheduler import OnProgress, Scheduler
from cake.session import Session

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that it completes; the last one says why it is the last."""

    token: int
    text: str
    finish_reason: FinishReason | None = None


def _nobody(n_tokens: int) -> None:
    """Who is told of progress when nobody wants to know."""


class Generator:
    """Answers prompts on a pipeline, any number of them at once."""

    def __init__(
        self,
        pipeline: Pipeline,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        prompt_chunk: int | None = None,
    ) -> None:
        self.pipeline, self.tokenizer = pipeline, tokenizer
        self._stop_ids, self._scheduler = stop_ids, Scheduler(pipeline, prompt_chunk)

    async def close_session(self, session: Session) -> None:
        """Free the session in every stage."""
        await self.pipeline.forget(session.number)

    def check(self, prompt: Sequence[int]) -> None:
        """Raise `CakeError` unless the prompt is one that this pipeline can answer."""
        check_prompt(prompt, self.pipeline.context, self.pipeline.config.vocab_size)

    async def generate(
        self,
        session: Session,
        prompt: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        on_progress: OnProgress = _nobody,
    ) -> AsyncIterator[Piece]:
        """Run the prompt and yield up to `max_tokens` tokens as they are made.

        `on_progress` is told how many tokens each part of the prompt had that was run.

        What the prompt shares with the session's tokens so far is not run again. Ends with the
        reason "stop" at one of the model's end tokens, with "length" at `max_tokens` or when the
        context is full.
        """
        self.check(prompt)
        session.keep_prefix(prompt)
        sampler, detokenizer = Sampler(sampling), Detokenizer(self.tokenizer)
        room = min(max_tokens, self.pipeline.context - len(prompt))
        for made in range(1, room + 1):
            tell = on_progress if made == 1 else _nobody
            choice = functools.partial(_sample, sampler, session)
            token = await self._scheduler.run(session, choice, on_progress=tell)
            session.ids.append(token)
            text = detokenizer.add(token)
            reason: FinishReason | None = None
            if token in self._stop_ids:
                reason = "stop"
            elif made == room:
                reason = "length"
            if reason:
                text += detokenizer.finish()
            yield Piece(token, text, reason)
            if reason:
                return


def _sample(sampler: Sampler, session: Session, logits: Tensor) -> int:
    return sampler.sample(logits[0], session.ids)


def check_prompt(prompt: Sequence[int], context: int, vocab_size: int) -> None:
    """Raise `CakeError` unless the prompt leaves room for a token and the model knows its tokens."""
    if not prompt:
        raise CakeError("the prompt is empty; say something with --prompt")
    if max(prompt) >= vocab_size:
        raise CakeError(
            f"the tokenizer made the token {max(prompt)}, but the model knows only {vocab_size}; "
            "do its files belong together?"
        )
    if len(prompt) >= context:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens and the context holds {context}, one of them "
            "for the answer; shorten the prompt or raise --context"
        )
