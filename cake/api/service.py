"""Answers to requests, made with a generator: prompts, sampling, stops, tool calls and counts of tokens.

Knows nothing of HTTP.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cake.api.answers import Usage
from cake.api.errors import ApiError
from cake.api.requests import ChatRequest, CompletionRequest, ResponseFormat, Sampled
from cake.api.stops import StopFinder
from cake.errors import CakeError
from cake.generator import Generator
from cake.job import nobody
from cake.model.grammar import Grammar
from cake.model.sampling import SamplingParams, Score, Scores
from cake.tasks import merged
from cake.tool_calls import Call, CallReader
from cake.tools import Offer, read_offer, template_messages

MOST_REQUESTS = 256  # at once, those that wait among them


class TokenScore(NamedTuple):
    """A token of the vocabulary, the bytes that it stands for, and its log probability."""

    token: bytes
    logprob: float


class ScoredToken(NamedTuple):
    """A token of an answer, and those that were likeliest in its place, best first."""

    chosen: TokenScore
    likeliest: tuple[TokenScore, ...]


@dataclass(frozen=True)
class Delta:
    """What a token added to an answer: text, calls of tools, and its own score where that is wanted."""

    text: str = ""
    calls: tuple[Call, ...] = ()
    scored: ScoredToken | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.calls or self.scored)


@dataclass
class Choice:
    """One of the answers to a request, so far."""

    n_tokens: int = 0
    finish_reason: str | None = None


@dataclass
class Task:
    """A request that was understood, and what came of it so far."""

    prompt: list[int]
    sampling: SamplingParams
    stops: list[str]
    max_tokens: int
    offer: Offer | None = None
    n: int = 1  # answers
    prompt_run: int = 0  # tokens of the prompt that no session held
    choices: list[Choice] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = [Choice() for _ in range(self.n)]

    @property
    def n_tokens(self) -> int:
        """Of all answers."""
        return sum(choice.n_tokens for choice in self.choices)

    def count(self, n_tokens: int) -> None:
        """So many tokens of the prompt were run."""
        self.prompt_run += n_tokens

    @property
    def usage(self) -> Usage:
        """Tokens, as OpenAI counts them."""
        n_prompt = len(self.prompt)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": self.n_tokens,
            "total_tokens": n_prompt + self.n_tokens,
            "prompt_tokens_details": {"cached_tokens": max(0, n_prompt - self.prompt_run)},
        }


class Service:
    """What a server offers of one model."""

    def __init__(self, generator: Generator, model: str, defaults: SamplingParams) -> None:
        self.model, self.started = model, int(time.time())
        self._generator, self._defaults = generator, defaults
        self._n_requests = 0

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Room for a request, while it lasts. Raises `ApiError` 503 where there is none."""
        if self._n_requests >= MOST_REQUESTS:
            raise ApiError(
                503, f"{MOST_REQUESTS} requests are being answered; try again", "busy", "server_error"
            )
        self._n_requests += 1
        try:
            yield
        finally:
            self._n_requests -= 1

    async def chat(self, request: ChatRequest) -> Task:
        """The task of a chat. Raises `CakeError` where it cannot be done."""
        self.check_model(request.model)
        tokenizer = self._generator.tokenizer
        if not tokenizer.has_chat_template:
            raise CakeError(f"{self.model} has no chat template; use /v1/completions")
        offer = read_offer(request.tools or (), request.tool_choice)
        messages = template_messages([message.for_template for message in request.messages])
        prompt = tokenizer.encode_chat(messages, offer.for_template)
        grammar = await self._grammar(request.response_format, offer)
        limit = request.max_completion_tokens or request.max_tokens
        return self._task(request, prompt, limit, grammar, offer if offer.tools else None)

    def completion(self, request: CompletionRequest) -> Task:
        """The task of a completion. Raises `CakeError` where it cannot be done."""
        self.check_model(request.model)
        prompt = request.prompt
        if isinstance(prompt, str):
            prompt = self._generator.tokenizer.encode(prompt)
        self._check_tokens("prompt", prompt)
        return self._task(request, prompt, request.max_tokens or 16)

    def text_of(self, prompt: str | Sequence[int]) -> str:
        """A completion's prompt as text."""
        return prompt if isinstance(prompt, str) else self._generator.tokenizer.decode(prompt)

    def check_model(self, name: str) -> None:
        """Raise `ApiError` 404 where it is not the one that is served."""
        if name != self.model:
            raise ApiError(
                404, f"the model {name!r} is not served here; {self.model!r} is", "model_not_found"
            )

    async def answers(self, task: Task) -> AsyncGenerator[tuple[int, Delta], None]:
        """What each token adds to which answer, as it comes; in the end the task knows how they ended."""
        if task.n == 1:
            async with contextlib.aclosing(self._answer(task, 0)) as parts:
                async for part in parts:
                    yield 0, part
            return
        await self._generator.read(task.prompt, task.count)  # once for all
        async with contextlib.aclosing(merged([self._answer(task, i) for i in range(task.n)])) as numbered:
            async for each in numbered:
                yield each

    async def _answer(self, task: Task, number: int) -> AsyncGenerator[Delta, None]:
        choice, stops = task.choices[number], StopFinder(task.stops)
        reader = CallReader(task.offer.names) if task.offer else None
        sampling, called = dataclasses.replace(task.sampling, seed=task.sampling.seed + number), False
        count = task.count if task.n == 1 else nobody
        pieces = self._generator.answer(task.prompt, sampling, task.max_tokens, count, copies=task.n > 1)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                choice.n_tokens += 1
                text = stops.feed(piece.text)
                if stops.found or piece.finish_reason:
                    choice.finish_reason = "stop" if stops.found else piece.finish_reason
                    text += stops.finish()
                read: list[str | Call] = [text]
                if reader:
                    read = reader.feed(text) + (reader.finish() if choice.finish_reason else [])
                delta = Delta(
                    "".join(part for part in read if isinstance(part, str)),
                    tuple(part for part in read if isinstance(part, Call)),
                    self._scored(piece.scores) if piece.scores else None,
                )
                called = called or bool(delta.calls)
                if choice.finish_reason and called:
                    choice.finish_reason = "tool_calls"
                if delta:
                    yield delta
                if choice.finish_reason:
                    break

    def _scored(self, scores: Scores) -> ScoredToken:
        def named(score: Score) -> TokenScore:
            return TokenScore(self._generator.tokenizer.token_bytes(score.token), score.logprob)

        return ScoredToken(named(scores.chosen), tuple(map(named, scores.likeliest)))

    def _task(
        self,
        request: Sampled,
        prompt: list[int],
        limit: int | None,
        grammar: Grammar | None = None,
        offer: Offer | None = None,
    ) -> Task:
        chosen: dict[str, Any] = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "repeat_penalty": request.repetition_penalty,
            "seed": request.seed,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "bias": self._bias(request),
            "scored": request.n_scored,
        }
        sampling = dataclasses.replace(
            self._defaults,
            grammar=grammar,
            **{key: value for key, value in chosen.items() if value is not None},
        )
        self._generator.check(prompt)
        most = self._generator.pipeline.context - len(prompt)
        return Task(prompt, sampling, request.stops, min(limit or most, most), offer, request.n or 1)

    def _bias(self, request: Sampled) -> tuple[tuple[int, float], ...] | None:
        if request.logit_bias is None:
            return None
        self._check_tokens("logit_bias", request.logit_bias)
        return tuple(request.logit_bias.items())

    def _check_tokens(self, field: str, tokens: Iterable[int]) -> None:
        size = self._generator.pipeline.config.vocab_size
        unknown = next((token for token in tokens if token >= size), None)
        if unknown is not None:
            raise CakeError(f"{field} names the token {unknown}, but the model has only {size}")

    async def _grammar(self, wanted: ResponseFormat | None, offer: Offer) -> Grammar | None:
        """What the answer is held to; reading it may take seconds, so another thread does."""

        def read() -> Grammar | None:
            if offer.grammar is not None:
                return self._generator.grammars.lark(offer.grammar)
            if wanted is None or wanted.type == "text":
                return None
            if wanted.type == "json_object":
                return self._generator.grammars.json_object()
            assert wanted.json_schema is not None
            return self._generator.grammars.json_schema(wanted.json_schema.schema_)

        if wanted is not None and wanted.type == "json_schema" and wanted.json_schema is None:
            raise CakeError("response_format of type json_schema needs a json_schema")
        if offer.tools and wanted is not None and wanted.type != "text":
            raise CakeError("tools and response_format do not go together; choose one")
        return await asyncio.to_thread(read)
