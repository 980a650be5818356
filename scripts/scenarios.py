"""What many requests, long prompts and slow links cost: the scenarios of `bench.py --scenario`.

Workers are real processes with one thread each; the master computes with one. Where two set-ups are
compared their runs take turns, and the ratio of medians counts.
"""

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import torch
from cluster import running_workers
from relay import Relay

from cake.device import DeviceThread
from cake.generator import Generator
from cake.model.linear import Placement
from cake.model.sampling import SamplingParams
from cake.model.tokenizer import Tokenizer
from cake.pipeline import open_pipeline
from cake.remote import Patience
from cake.session import Session
from cake.text import columns
from cake.topology import Node, Topology
from cake.weights.checkpoint import Checkpoint

GREEDY = SamplingParams(temperature=0, repeat_penalty=1)
CONTEXT = 4096


@dataclass(frozen=True)
class Outcome:
    """One scenario: what was measured, in words, and the figure that must reach (or stay below) a bar."""

    name: str
    measured: str
    figure: float
    bar: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        """Whether the bar is reached."""
        return self.figure <= self.bar if self.at_most else self.figure >= self.bar


@dataclass(frozen=True)
class Bench:
    """The model under test, and how its numbers are kept."""

    checkpoint: Checkpoint
    placement: Placement
    runs: int

    def prompt(self, n_tokens: int, seed: int = 0) -> list[int]:
        """Random tokens, the same for the same seed."""
        random = torch.Generator().manual_seed(seed)
        return torch.randint(self.checkpoint.config.vocab_size, (n_tokens,), generator=random).tolist()

    @contextlib.asynccontextmanager
    async def cluster(self, n_workers: int) -> AsyncIterator[Generator]:
        """A generator over fresh workers."""
        with running_workers(self.checkpoint, n_workers, 1, self.placement) as topology:
            async with self.over(topology) as generator:
                yield generator

    @contextlib.asynccontextmanager
    async def over(self, topology: Topology) -> AsyncIterator[Generator]:
        """A generator over these nodes."""
        context = min(self.checkpoint.config.context, CONTEXT)
        thread = DeviceThread(self.placement, 1)
        pipeline = await open_pipeline(self.checkpoint, topology, thread, context, Patience())
        try:
            yield Generator(pipeline, Tokenizer(self.checkpoint.folder), frozenset())
        finally:
            await pipeline.close()


async def moments(generator: Generator, prompt: Sequence[int], n: int) -> list[float]:
    """When the request began, and when each of its `n` tokens came."""
    session = Session()
    pieces = generator.generate(session, prompt, GREEDY, n)
    times = [time.perf_counter()] + [time.perf_counter() async for _ in pieces]
    await generator.close_session(session)
    return times


async def seconds(work: Awaitable[object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def in_turn(runs: int, *works: Callable[[], Awaitable[float]]) -> list[float]:
    """The median of each, run by run in turns, after one round that is not counted."""
    rounds = [[await work() for work in works] for _ in range(runs + 1)][1:]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


async def prompt_over_two(bench: Bench, n_tokens: int = 1024) -> Outcome:
    """A prompt in overlapping chunks."""
    prompt = bench.prompt(n_tokens)
    async with bench.cluster(1) as one, bench.cluster(2) as two:
        alone, shared = await in_turn(
            bench.runs, *(lambda g=g: seconds(moments(g, prompt, 1)) for g in (one, two))
        )
    measured = f"{n_tokens / alone:.1f} tokens/s over one worker, {n_tokens / shared:.1f} over two"
    return Outcome(f"prompt of {n_tokens}, 2 workers by 1", measured, alone / shared, 1.8)


async def eight_requests(bench: Bench, bar: float, n_tokens: int = 24) -> Outcome:
    """Requests that share the passes."""
    async with bench.cluster(2) as generator:

        async def generation(n_requests: int) -> float:
            prompts = [bench.prompt(16, seed) for seed in range(n_requests)]
            times = await asyncio.gather(*(moments(generator, prompt, n_tokens) for prompt in prompts))
            begin, end = max(t[2] for t in times), min(t[-1] for t in times)
            made = sum(begin < moment <= end for t in times for moment in t[1:])
            return made / (end - begin)

        one, eight = await in_turn(bench.runs, lambda: generation(1), lambda: generation(8))
    return Outcome(
        "8 requests by one, 2 workers", f"{one:.1f} tokens/s alone, {eight:.1f} together", eight / one, bar
    )


async def beside_a_long_prompt(bench: Bench, n_prompt: int = 2000) -> Outcome:
    """The longest gap between two tokens of one user while another sends a long prompt."""
    async with bench.cluster(2) as generator:
        await moments(generator, bench.prompt(16), 8)
        quiet = await moments(generator, bench.prompt(16), 24)
        median = statistics.median(gaps(quiet))
        session, times = Session(), [0.0]
        long = asyncio.create_task(moments(generator, bench.prompt(n_prompt, 1), 1))
        pieces = generator.generate(session, bench.prompt(16), GREEDY, CONTEXT // 2)
        async for _ in pieces:
            times.append(time.perf_counter())
            if long.done():
                break
        await pieces.aclose()
        chunk = await seconds(moments(generator, bench.prompt(64, 2), 1))
    longest = max(gaps(times[1:]))
    measured = (
        f"longest gap {1e3 * longest:.0f} ms; median alone {1e3 * median:.0f}, a chunk {1e3 * chunk:.0f}"
    )
    return Outcome(
        f"one generates beside a prompt of {n_prompt}", measured, longest, 3 * median + chunk, True
    )


def gaps(times: Sequence[float]) -> list[float]:
    """Seconds between neighbours."""
    return [after - before for before, after in itertools.pairwise(times)]


@contextlib.asynccontextmanager
async def delayed(topology: Topology, delay: float) -> AsyncIterator[Topology]:
    """The same nodes, each behind a link with this one-way delay."""
    async with contextlib.AsyncExitStack() as stack:
        nodes = {}
        for node in topology.nodes.values():
            relay = await stack.enter_async_context(Relay((node.host, node.port), delay=delay))
            nodes[node.name] = Node(node.name, *relay.address, node.spans, node.description)
        yield Topology(nodes)


async def behind_slow_links(bench: Bench, n_workers: int = 4, delay: float = 0.02, n: int = 24) -> Outcome:
    """What a token takes beyond N + 1 trips and the computing."""
    with running_workers(bench.checkpoint, n_workers, 1, bench.placement) as topology:
        async with bench.over(topology) as near, delayed(topology, delay) as distant:
            token, network = await _token_and_network(bench, near, n)
            compute = token - network
            async with bench.over(distant) as far:
                token, _ = await _token_and_network(bench, far, n)
    trips = (n_workers + 1) * delay
    measured = f"{1e3 * token:.1f} ms a token; trips {1e3 * trips:.0f}, computing {1e3 * compute:.1f}"
    limit = trips + compute + 0.005
    return Outcome(f"{n_workers} workers behind {1e3 * delay:.0f} ms, s", measured, token, limit, True)


async def _token_and_network(bench: Bench, generator: Generator, n: int) -> tuple[float, float]:
    """Median seconds of a token, and how many of them were neither the stages' nor the head's computing."""
    await moments(generator, bench.prompt(16), 4)
    stages = generator.pipeline.stages
    before = sum(stage.stats.network_s for stage in stages)
    times = await moments(generator, bench.prompt(16), n)
    network = sum(stage.stats.network_s for stage in stages) - before
    return statistics.median(gaps(times[2:])), network / n


async def second_turn(bench: Bench, history: int = 1000) -> Outcome:
    """Time to the first token of a chat's second turn, by that of the same prompt cold."""
    async with bench.cluster(2) as generator:

        async def warm() -> float:
            session = Session()
            first = bench.prompt(history)
            answer = [p.token async for p in generator.generate(session, first, GREEDY, 4)]
            return await seconds(_first(generator, session, [*first, *answer, *bench.prompt(20, 5)]))

        async def cold() -> float:
            return await seconds(_first(generator, Session(), bench.prompt(history + 24)))

        second, first = await in_turn(bench.runs, warm, cold)
    measured = f"{1e3 * second:.0f} ms, cold {1e3 * first:.0f} ms"
    return Outcome(f"second turn after {history} tokens, by a cold one", measured, second / first, 0.15, True)


async def _first(generator: Generator, session: Session, prompt: Sequence[int]) -> None:
    async for _ in generator.generate(session, prompt, GREEDY, 1):
        pass
    await generator.close_session(session)


async def overhead(bench: Bench, n: int = 200) -> Outcome:
    """Per stage and token over loopback, everything but computing, microseconds."""
    async with bench.cluster(2) as generator:
        session, losses = Session(), []
        stages = generator.pipeline.stages
        before = [stage.stats.network_s for stage in stages]
        async for _ in generator.generate(session, bench.prompt(8), GREEDY, n):
            now = [stage.stats.network_s for stage in stages]
            losses += [1e6 * (a - b) for a, b in zip(now, before, strict=True)]
            before = now
    median = statistics.median(losses[2 * len(stages) :])
    return Outcome("loopback, per stage and token", f"{median:.0f} µs beyond computing", median, 300, True)


async def eight(bench: Bench) -> Outcome:
    """As much as reading weights once for several rows allows."""
    return await eight_requests(bench, 5.0 if bench.placement.quantize == "none" else 6.0)


SCENARIOS: dict[str, Callable[[Bench], Awaitable[Outcome]]] = {
    "prompt": prompt_over_two,
    "requests": eight,
    "beside": beside_a_long_prompt,
    "links": behind_slow_links,
    "turn": second_turn,
    "overhead": overhead,
}


def run_scenarios(names: Sequence[str], bench: Bench) -> list[Outcome]:
    """Those that are named, one after another."""
    return [asyncio.run(SCENARIOS[name](bench)) for name in names]


def scenario_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """A table for a person."""
    rows = [["scenario", "measured", "figure", "bar", ""]]
    for outcome in outcomes:
        sign = "≤" if outcome.at_most else "≥"
        bar = f"{sign} {outcome.bar:.3g}"
        verdict = "holds" if outcome.holds else "falls short"
        rows.append([outcome.name, outcome.measured, f"{outcome.figure:.3g}", bar, verdict])
    return columns(rows)
