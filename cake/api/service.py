"""Answers to requests, made with a generator: prompts, sampling, stops, tool calls and counts of tokens.

Knows nothing of HTTP.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

from cake.api.errors import ApiError
from cake.api.requests import ChatRequest, CompletionRequest, ResponseFormat, Sampled
from cake.api.stops import StopFinder
from cake.errors import CakeError
from cake.generator import Generator
from cake.model.grammar import Grammar
from cake.model.sampling import SamplingParams
from cake.tool_calls import Call, CallReader
from cake.tools import Offer, read_offer, template_messages

MOST_REQUESTS = 256  # at once, those that wait among them


@dataclass
class Task:
    """A request that was understood, and what came of it so far."""

    prompt: list[int]
    sampling: SamplingParams
    stops: list[str]
    max_tokens: int
    offer: Offer | None = None
    prompt_run: int = 0  # tokens of the prompt that no session held
    n_tokens: int = 0  # of the answer
    finish_reason: str | None = None

    @property
    def usage(self) -> dict[str, object]:
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
        prompt = self._generator.tokenizer.encode(request.prompt)
        return self._task(request, prompt, request.max_tokens or 16)

    def check_model(self, name: str) -> None:
        """Raise `ApiError` 404 where it is not the one that is served."""
        if name != self.model:
            raise ApiError(
                404, f"the model {name!r} is not served here; {self.model!r} is", "model_not_found"
            )

    async def answer(self, task: Task) -> AsyncGenerator[str | Call, None]:
        """The answer's text and its calls of tools, piece by piece; the task says in the end how it went."""

        def count(n_tokens: int) -> None:
            task.prompt_run += n_tokens

        stops = StopFinder(task.stops)
        reader = CallReader(task.offer.names) if task.offer else None
        pieces = self._generator.answer(task.prompt, task.sampling, task.max_tokens, count)
        called = False
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                task.n_tokens += 1
                text = stops.feed(piece.text)
                if stops.found or piece.finish_reason:
                    task.finish_reason = "stop" if stops.found else piece.finish_reason
                    text += stops.finish()
                read: list[str | Call] = [text]
                if reader:
                    read = reader.feed(text) + (reader.finish() if task.finish_reason else [])
                for part in read:
                    called = called or isinstance(part, Call)
                    if part:
                        yield part
                if task.finish_reason:
                    break
        if called:
            task.finish_reason = "tool_calls"

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
        }
        sampling = dataclasses.replace(
            self._defaults,
            grammar=grammar,
            **{key: value for key, value in chosen.items() if value is not None},
        )
        self._generator.check(prompt)
        most = self._generator.pipeline.context - len(prompt)
        return Task(prompt, sampling, request.stops, min(limit or most, most), offer)

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
