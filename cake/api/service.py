"""Answers to requests, made with a generator: prompts, sampling, stops, tool calls and counts of tokens.

Knows nothing of HTTP.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cake.api.errors import ApiError
from cake.api.stops import StopFinder
from cake.api.task import Asked, Delta, ScoredToken, Task, TokenScore
from cake.errors import CakeError
from cake.generator import Generator
from cake.job import nobody
from cake.model.config import ModelConfig
from cake.model.grammar import Grammar
from cake.model.sampling import SamplingParams, Score, Scores
from cake.model.tokenizer import texts_in
from cake.tasks import merged
from cake.tool_calls import Call, CallReader
from cake.tools import Offer, template_messages

MOST_REQUESTS = 256  # at once, those that wait among them
LONG_TEXT = 1 << 14  # characters: ten milliseconds until they are tokens
NO_TOOLS = Offer([])
Messages = Sequence[Mapping[str, Any]]  # in OpenAI's shape, which is that of chat templates


class Service:
    """What a server offers of one model."""

    def __init__(self, generator: Generator, model: str, defaults: SamplingParams) -> None:
        self.model, self.started = model, int(time.time())
        self._generator, self._defaults = generator, defaults
        self._n_requests = 0
        self._reading = asyncio.Lock()

    @property
    def knows_chats(self) -> bool:
        """Whether the model answers messages."""
        return self._generator.tokenizer.has_chat_template

    @property
    def knows_tools(self) -> bool:
        """Whether the model was told how to call tools."""
        return self._generator.tokenizer.knows_tools

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self._generator.pipeline.context

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self._generator.pipeline.config

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

    async def chat(self, asked: Asked, messages: Messages, offer: Offer = NO_TOOLS) -> Task:
        """The task of a chat. Raises `CakeError` where it cannot be done."""
        if offer.tools and asked.schema is not None:
            raise CakeError("tools and a format of the answer do not go together; choose one")
        prompt = await self.chat_prompt(messages, offer)
        grammar = await self._grammar(asked.schema, offer)
        return self._task(asked, prompt, grammar, offer if offer.tools else None)

    async def chat_prompt(self, messages: Messages, offer: Offer = NO_TOOLS) -> list[int]:
        """The tokens of a chat, up to where the answer begins. Raises `CakeError` where it has none."""
        if not self.knows_chats:
            raise CakeError(f"{self.model} has no chat template; use /v1/completions")
        chat, tools = template_messages(messages), offer.for_template
        n_characters = sum(map(len, texts_in([*chat, *tools])))
        return await self._read(n_characters, lambda: self._generator.tokenizer.encode_chat(chat, tools))

    async def completion(self, asked: Asked, prompt: str | list[int]) -> Task:
        """The task of a completion. Raises `CakeError` where it cannot be done."""
        if isinstance(prompt, str):
            text = prompt
            prompt = await self._read(len(text), lambda: self._generator.tokenizer.encode(text))
        self._check_tokens("prompt", prompt)
        return self._task(asked, prompt, await self._grammar(asked.schema, NO_TOOLS))

    async def _read(self, n_characters: int, encode: Callable[[], list[int]]) -> list[int]:
        """The tokens of a text; of a long one in another thread, so that nobody waits for it.

        Short ones are read at once, which keeps their order of arrival; long ones one after the other,
        which leaves processors to the model.
        """
        if n_characters < LONG_TEXT:
            return encode()
        async with self._reading:
            return await asyncio.to_thread(encode)

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
                choice.add_token()
                text = stops.feed(piece.text)
                if stops.found or piece.finish_reason:
                    choice.finish_reason = "stop" if stops.found else piece.finish_reason
                    choice.stop = stops.found
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
        self, asked: Asked, prompt: list[int], grammar: Grammar | None, offer: Offer | None = None
    ) -> Task:
        chosen: dict[str, Any] = {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k,
            "seed": asked.seed,
            "repeat_penalty": asked.repeat_penalty,
            "repeat_last_n": asked.repeat_last_n,
            "presence_penalty": asked.presence_penalty,
            "frequency_penalty": asked.frequency_penalty,
            "bias": self._bias(asked.logit_bias),
            "scored": asked.n_scored,
        }
        sampling = dataclasses.replace(
            self._defaults,
            grammar=grammar,
            **{key: value for key, value in chosen.items() if value is not None},
        )
        self._generator.check(prompt)
        most = self.context - len(prompt)
        return Task(prompt, sampling, asked.stops, min(asked.max_tokens or most, most), offer, asked.n)

    def _bias(self, bias: Mapping[int, float] | None) -> tuple[tuple[int, float], ...] | None:
        if bias is None:
            return None
        self._check_tokens("logit_bias", bias)
        return tuple(bias.items())

    def _check_tokens(self, field: str, tokens: Iterable[int]) -> None:
        size = self.config.vocab_size
        unknown = next((token for token in tokens if token >= size), None)
        if unknown is not None:
            raise CakeError(f"{field} names the token {unknown}, but the model has only {size}")

    async def _grammar(self, schema: Mapping[str, Any] | None, offer: Offer) -> Grammar | None:
        """What the answer is held to; reading it may take seconds, so another thread does."""
        if offer.grammar is None and schema is None:
            return None  # at once: requests without one keep their order of arrival

        def read() -> Grammar:
            if offer.grammar is not None:
                return self._generator.grammars.lark(offer.grammar)
            assert schema is not None
            return self._generator.grammars.json_schema(schema)

        return await asyncio.to_thread(read)
