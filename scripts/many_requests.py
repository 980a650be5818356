"""The scenarios of many requests: together, beside a long prompt, and waiting for their turn."""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from cluster import worker_processes
from trial import CONTEXT, GREEDY, Bench, Outcome, first_token, gaps, generator_over, in_turn, moments

from cake import kernels
from cake.chunks import CHUNK_BESIDE_OTHERS
from cake.generator import Generator
from cake.model.cache import FIRST_CAPACITY
from cake.pool import SessionPool
from cake.session import Session
from cake.text import human_bytes


async def eight_requests(bench: Bench, n_tokens: int = 24) -> Outcome:
    """Eight requests that share the passes, by one alone."""
    # As much as reading weights once for several rows allows.
    bar = 5.0 if bench.placement.quantize == "none" else 6.0
    async with bench.cluster(2) as generator:

        async def generation(n_requests: int) -> float:
            bench.begin(generator.pipeline)
            prompts = [bench.prompt(16, seed) for seed in range(n_requests)]
            times = await asyncio.gather(*(moments(generator, prompt, n_tokens) for prompt in prompts))
            begin, end = max(t[2] for t in times), min(t[-1] for t in times)
            made = sum(begin < moment <= end for t in times for moment in t[1:])
            return made / (end - begin)

        one, eight = await in_turn(bench.runs, lambda: generation(1), lambda: generation(8))
        n_groups = generator.n_groups
    measured = f"{one:.1f} tokens/s alone, {eight:.1f} together, in groups: {n_groups}"
    return Outcome("8 requests by one, 2 workers", measured, eight / one, bar)


async def same_texts(bench: Bench, n: int = 24, together: int = 8, n_tokens: int = 48) -> Outcome:
    """The share of texts that are the same whether requests run alone or eight at once."""
    async with bench.cluster(2) as generator:

        async def text(prompt: Sequence[int]) -> list[int]:
            session = Session()
            tokens = [p.token async for p in generator.generate(session, prompt, GREEDY, n_tokens)]
            await generator.close_session(session)
            return tokens

        prompts = [bench.prompt(8 + 5 * seed, seed) for seed in range(n)]
        alone = [await text(prompt) for prompt in prompts]
        crowd: list[list[int]] = []
        for first in range(0, n, together):
            crowd += await asyncio.gather(*map(text, prompts[first : first + together]))
    same = sum(a == b for a, b in zip(alone, crowd, strict=True))
    measured = f"{same} of {n}, each of {n_tokens} tokens"
    # torch's products round otherwise where there are more rows, Cake's own do not.
    exact = bench.placement.dtype == torch.float32 or kernels.library() is not None
    bar = 1.0 if exact else 0.0
    return Outcome(f"texts of {together} at once that are those of one alone", measured, same / n, bar)


async def beside_a_long_prompt(bench: Bench, n_prompt: int = 2000) -> Outcome:
    """The longest gap between two tokens of one user while another sends a long prompt."""
    long = bench.prompt(n_prompt, 1)
    async with bench.cluster(2) as generator:
        await moments(generator, bench.prompt(16), 8)
        median = statistics.median(gaps(await moments(generator, bench.prompt(16), 24)))
        chunk = await last_chunk(generator, long, bench.runs)
        bench.begin(generator.pipeline)
        other = asyncio.create_task(moments(generator, long, 1))
        times: list[float] = []
        pieces = generator.generate(Session(), bench.prompt(16), GREEDY, CONTEXT // 2)
        async for _ in pieces:
            times.append(time.perf_counter())
            if other.done():
                break
        await pieces.aclose()
    longest = max(gaps(times))
    measured = f"longest gap {1e3 * longest:.0f} ms; median alone {1e3 * median:.0f}, "
    measured += f"the prompt's last chunk alone {1e3 * chunk:.0f}"
    name = f"one generates beside a prompt of {n_prompt}, s"
    return Outcome(name, measured, longest, 3 * median + chunk, at_most=True)


async def last_chunk(generator: Generator, prompt: Sequence[int], runs: int) -> float:
    """Median seconds of the prompt's last tokens, as many as travel at once while others generate."""
    session, before = Session(), prompt[:-CHUNK_BESIDE_OTHERS]
    await first_token(generator, session, before)

    async def run() -> float:
        session.cut(len(before))
        return await first_token(generator, session, prompt)

    (chunk,) = await in_turn(runs, run)
    await generator.close_session(session)
    return chunk


@dataclass
class Crowd:
    """Requests that come all at once: who had the first token when, and the memory when each was answered."""

    generator: Generator
    memory: Callable[[], int]
    order: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    async def ask(self, number: int, prompt: Sequence[int], n_tokens: int) -> None:
        """One of them."""
        first = True
        async for _ in self.generator.answer(prompt, GREEDY, n_tokens):
            if first:
                self.order.append(number)
            first = False
        self.sizes.append(self.memory())

    @property
    def wrong(self) -> str:
        """What is, if anything."""
        return "" if self.order == sorted(self.order) else "not in order of arrival"

    @property
    def growth(self) -> int:
        """Bytes by which the second half of the requests needed more than the first half."""
        half = len(self.sizes) // 2
        return max(self.sizes[half:]) - max(self.sizes[:half])


async def waiting(bench: Bench, n: int = 64, answer: int = 4) -> Outcome:
    """Memory while many requests wait beside as many idle sessions, which must make room for them."""
    prompt = FIRST_CAPACITY - answer  # a session fills its cache: memory that is used again is in use at once
    with worker_processes(bench.checkpoint, 2, 1, bench.placement) as (topology, processes):
        everybody = [psutil.Process(), *(psutil.Process(process.pid) for process in processes)]

        def memory() -> int:
            return sum(process.memory_info().rss for process in everybody)

        async with generator_over(topology, bench.checkpoint, bench.placement) as generator:
            generator.sessions = SessionPool(generator.close_session, kept_tokens=n * FIRST_CAPACITY)

            async def crowd(seeds: range) -> Crowd:
                bench.begin(generator.pipeline)
                crowd = Crowd(generator, memory)
                prompts = [bench.prompt(prompt, seed) for seed in seeds]
                await asyncio.gather(*(crowd.ask(i, ids, answer) for i, ids in enumerate(prompts)))
                return crowd

            before = memory()
            await crowd(range(n))
            idle = memory() - before
            queued = await crowd(range(n, 2 * n))
    return waiting_outcome(queued, n, idle)


def waiting_outcome(queued: Crowd, n: int, idle: int) -> Outcome:
    """Of `n` requests beside `n` sessions that took `idle` bytes.

    If nothing made room for them, the second half would add half as much as the idle ones took.
    """
    measured = f"{human_bytes(idle)} for {n} idle sessions; beside them the requests' second half took "
    measured += f"{queued.growth / 1e6:+.1f} MB"
    name = f"{n} requests wait beside {n} idle sessions, growth by what they hold"
    return Outcome(name, measured, queued.growth / (idle / 2), 0.1, at_most=True, wrong=queued.wrong)
