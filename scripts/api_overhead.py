"""The scenario of what HTTP costs: a streamed chat, by the same answer from the bare generator.

The same two workers serve both masters, one answer after the other: a server in a process of its own,
and a generator in this one, which has the prompt's tokens at hand. So all that a server does counts:
reading the request, its template and tokens, events and sockets, and the client's reading of them. It is
always the same chat, so that the first token is not that of a long pass, whose time varies by more.
"""

import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cluster import api_process, worker_processes
from http_stream import HttpStream, http_stream
from trial import GREEDY, Bench, Outcome, gaps, generator_over

from cake.generator import Generator
from cake.master import message

TOKEN_MS, REQUEST_MS = 1.0, 10.0
ANSWERS = 4  # for each run that is asked for
CHAT = [message("user", "Tell a long story of the sea.")]
SAMPLING = {"temperature": GREEDY.temperature, "repetition_penalty": GREEDY.repeat_penalty}


@dataclass(frozen=True)
class Moments:
    """Of one answer, in seconds: its beginning, each of its texts, its end."""

    begun: float
    texts: Sequence[float]
    ended: float

    @property
    def request_s(self) -> float:
        """What is not between tokens: until the first one, and after the last."""
        return self.texts[0] - self.begun + self.ended - self.texts[-1]


async def api_overhead(bench: Bench, n_tokens: int = 32) -> Outcome:
    """Milliseconds that a token takes longer in a stream over HTTP than from the generator; and a request."""
    with worker_processes(bench.checkpoint, 2, 1, bench.placement) as (topology, _):
        server = api_process(bench.checkpoint, topology, bench.placement)
        opening = generator_over(topology, bench.checkpoint, bench.placement)
        with server as (url, _):
            async with opening as endless, http_stream(url) as stream:
                generator = Generator(endless.pipeline, endless.tokenizer, bench.checkpoint.stop_ids)
                prompt = generator.tokenizer.encode_chat(CHAT)
                pairs = await taking_turns(
                    ANSWERS * bench.runs,
                    lambda: from_generator(generator, prompt, n_tokens),
                    lambda: over_http(stream, bench.checkpoint.name, n_tokens),
                )
    return overhead_outcome(pairs)


async def taking_turns(n: int, *works: Callable[[], Awaitable[Moments]]) -> list[list[Moments]]:
    """Answers of each, one after the other, after a round that is not counted."""
    return [[await work() for work in works] for _ in range(n + 1)][1:]


async def from_generator(generator: Generator, prompt: Sequence[int], n_tokens: int) -> Moments:
    """An answer of the bare generator."""
    begun = time.perf_counter()
    async with aclosing(generator.answer(prompt, GREEDY, n_tokens)) as pieces:
        return await moments(begun, (piece.text async for piece in pieces))


async def over_http(stream: HttpStream, model: str, n_tokens: int) -> Moments:
    """The same as a stream of events."""
    body = {"model": model, "messages": CHAT, "max_tokens": n_tokens, "stream": True}
    begun = time.perf_counter()
    events = stream.events("/v1/chat/completions", {**body, **SAMPLING})
    return await moments(begun, (text_of(json.loads(event)) async for event in events))


def text_of(chunk: dict[str, Any]) -> str:
    """What an event adds to a chat's answer."""
    return str(chunk["choices"][0]["delta"].get("content", ""))


async def moments(begun: float, texts: AsyncIterator[str]) -> Moments:
    """When there was text: a token that completes none is counted with the next."""
    times = [time.perf_counter() async for text in texts if text]
    return Moments(begun, times, time.perf_counter())


def overhead_outcome(pairs: Sequence[Sequence[Moments]]) -> Outcome:
    """Of the same answer without HTTP and with it, so many times."""
    bare, served = zip(*pairs, strict=True)
    token = [1e3 * statistics.median(itertools.chain(*(gaps(m.texts) for m in of))) for of in (bare, served)]
    request = [1e3 * statistics.median(m.request_s for m in of) for of in (bare, served)]
    more = 1e3 * statistics.median(with_it.request_s - without.request_s for without, with_it in pairs)
    measured = f"a token {token[0]:.2f} ms, over HTTP {token[1]:.2f}; "
    measured += f"a request beside that {request[0]:.1f} and {request[1]:.1f}: {more:+.1f}, bar {REQUEST_MS}"
    wrong = "" if more <= REQUEST_MS else f"a request takes more than {REQUEST_MS:g} ms longer"
    return Outcome("HTTP, ms a token", measured, token[1] - token[0], TOKEN_MS, at_most=True, wrong=wrong)
