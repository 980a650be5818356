"""The scenario of many clients of `cake-cli --api`: is one lost, does one overtake, does memory grow?"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
from cluster import api_process, worker_processes
from http_stream import HttpStream, RefusedError, http_stream
from trial import Bench, Outcome

from cake.model.cache import FIRST_CAPACITY, bytes_per_token
from cake.text import human_bytes

TOGETHER_S = 0.005  # what is less apart may change its order on its way through sockets


@dataclass
class Asked:
    """A request: when it was sent, when its first token came, and what went wrong."""

    sent_s: float
    first_s: float = float("inf")
    error: str = "the answer has no end"


@dataclass
class Load:
    """Requests for `n_tokens` each over several connections, and the memory when each was answered."""

    url: str
    model: str
    n_tokens: int
    memory: Callable[[], int]
    asked: list[Asked] = field(default_factory=list)  # in the order of sending
    sizes: list[int] = field(default_factory=list)

    async def run(self, prompts: Sequence[Sequence[int]], n_connections: int) -> None:
        """Each connection sends one of the prompts after another, as long as there are any."""
        left = iter(prompts)
        await asyncio.gather(*(self._connection(left) for _ in range(n_connections)))

    async def _connection(self, prompts: Iterator[Sequence[int]]) -> None:
        async with http_stream(self.url) as stream:
            for prompt in prompts:
                await self._ask(stream, prompt)

    async def _ask(self, stream: HttpStream, prompt: Sequence[int]) -> None:
        asked = Asked(time.perf_counter())
        self.asked.append(asked)
        body = {"model": self.model, "prompt": prompt, "max_tokens": self.n_tokens, "temperature": 0}
        told = {"stream": True, "logprobs": 0}  # so that every token is told, also one that completes no text
        try:
            async for event in stream.events("/v1/completions", {**body, **told}):
                self._hear(asked, json.loads(event))
        except (RefusedError, asyncio.IncompleteReadError) as error:
            asked.error = str(error)
        self.sizes.append(self.memory())

    def _hear(self, asked: Asked, told: dict[str, Any]) -> None:
        if "error" in told:
            asked.error = told["error"]["message"]
            return
        (choice,) = told["choices"]
        if choice["logprobs"]:
            asked.first_s = min(asked.first_s, time.perf_counter())
        if choice["finish_reason"]:
            asked.error = ""

    @property
    def lost(self) -> list[Asked]:
        """The requests that were not answered to the end."""
        return [asked for asked in self.asked if asked.error]

    @property
    def overtaken(self) -> int:
        """How many saw a later one have its first token before them."""
        return sum(any(_overtakes(late, early) for late in self.asked) for early in self.asked)

    @property
    def wrong(self) -> str:
        """What is, if anything."""
        if lost := self.lost:
            return f"{len(lost)} lost: {lost[0].error}"
        return f"{self.overtaken} were overtaken" if self.overtaken else ""

    @property
    def growth(self) -> int:
        """Bytes by which the second half of the requests needed more than the first half."""
        half = len(self.sizes) // 2
        return max(self.sizes[half:]) - max(self.sizes[:half])


def _overtakes(late: Asked, early: Asked) -> bool:
    return late.sent_s > early.sent_s + TOGETHER_S and late.first_s < early.first_s - TOGETHER_S


async def api_load(bench: Bench, n: int = 200, n_connections: int = 32, answer: int = 6) -> Outcome:
    """Many requests over many connections to a server with two workers: memory that the second half adds."""
    config = bench.checkpoint.config
    session = FIRST_CAPACITY * bytes_per_token(config, config.n_blocks, bench.placement.dtype)
    # Room for as many sessions as are answered at once and again as many, so that the first half fills it.
    room = ["--cache-memory", f"{16 * session}B"]
    with worker_processes(bench.checkpoint, 2, 1, bench.placement, options=room) as (topology, workers):
        opening = api_process(bench.checkpoint, topology, bench.placement)
        with opening as (url, master):
            everybody = [psutil.Process(process.pid) for process in (master, *workers)]

            def memory() -> int:
                return sum(process.memory_info().rss for process in everybody)

            load = Load(url, bench.checkpoint.name, answer, memory)
            await load.run([bench.prompt(32, seed) for seed in range(n)], n_connections)
    return load_outcome(load, n_connections, session)


def load_outcome(load: Load, n_connections: int, session: int) -> Outcome:
    """Judged by the `session` bytes that each request of the second half would add if nothing made room."""
    n = len(load.asked)
    began, ended = load.asked[0].sent_s, max(asked.first_s for asked in load.asked)
    measured = f"{n / (ended - began):.1f} requests/s, {len(load.lost)} lost, {load.overtaken} overtaken; "
    held = n // 2 * session
    measured += f"the second half took {load.growth / 1e6:+.1f} MB, its sessions {human_bytes(held)}"
    name = f"{n} requests from {n_connections} connections, growth by what the second half's sessions hold"
    figure = load.growth / held
    return Outcome(name, measured, figure, 0.1, at_most=True, wrong=load.wrong)
