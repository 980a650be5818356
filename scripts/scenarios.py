"""What requests, long prompts, slow links, encryption, loading, HTTP cost: `bench.py --scenario`.

Workers are real processes with one thread each; the master computes with one. Where two set-ups are
compared their runs take turns, and the ratio of medians counts.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

import click
from api_load import api_load
from api_overhead import api_overhead
from bare_ring import bare_overhead
from distant_workers import behind_slow_links, guessing, int8_on_the_wire
from encryption import encrypted
from loading import alternating, loading, resident
from many_requests import beside_a_long_prompt, eight_requests, same_texts, waiting
from trial import GREEDY, Bench, Outcome, first_token, in_turn, three_digits

from cake.generator import Generator
from cake.session import Session
from cake.text import columns


async def prompt_over_two(bench: Bench, n_tokens: int = 1024) -> Outcome:
    """A prompt in overlapping chunks over two workers, by one."""
    prompt = bench.prompt(n_tokens)

    async def run(generator: Generator) -> float:
        bench.begin(generator.pipeline)
        return await cold(generator, prompt)

    async with bench.cluster(1) as one, bench.cluster(2) as two:
        alone, shared = await in_turn(bench.runs, lambda: run(one), lambda: run(two))
    measured = f"{n_tokens / alone:.1f} tokens/s over one worker, {n_tokens / shared:.1f} over two"
    return Outcome(f"prompt of {n_tokens}, 2 workers by 1", measured, alone / shared, 1.8)


async def cold(generator: Generator, prompt: Sequence[int]) -> float:
    """Seconds to the first token of a session that holds nothing."""
    session = Session()
    took = await first_token(generator, session, prompt)
    await generator.close_session(session)
    return took


async def second_turn(bench: Bench, history: int = 1000) -> Outcome:
    """Time to the first token of a chat's second turn, by that of the same prompt cold."""
    async with bench.cluster(2) as generator:

        async def warm() -> float:
            session, first = Session(), bench.prompt(history)
            answer = [p.token async for p in generator.generate(session, first, GREEDY, 4)]
            bench.begin(generator.pipeline)
            took = await first_token(generator, session, [*first, *answer, *bench.prompt(20, 5)])
            await generator.close_session(session)
            return took

        whole = bench.prompt(history + 24)
        first, second = await in_turn(bench.runs, lambda: cold(generator, whole), warm)
    measured = f"{1e3 * second:.0f} ms, cold {1e3 * first:.0f} ms"
    name = f"second turn after {history} tokens, by a cold one"
    return Outcome(name, measured, second / first, 0.15, at_most=True)


async def overhead(bench: Bench, n: int = 200) -> Outcome:
    """Per stage and token over loopback, everything but computing, microseconds."""
    async with bench.cluster(2) as generator:
        session, losses = Session(), []
        stages = generator.pipeline.stages
        before = [stage.stats.network_s for stage in stages]
        bench.begin(generator.pipeline)
        async for _ in generator.generate(session, bench.prompt(8), GREEDY, n):
            now = [stage.stats.network_s for stage in stages]
            losses += [1e6 * (a - b) for a, b in zip(now, before, strict=True)]
            before = now
    median = statistics.median(losses[2 * len(stages) :])
    message_bytes = stages[0].stats.bytes_sent // stages[0].stats.messages
    floor = 1e6 * bare_overhead(len(stages), message_bytes, bench.weight_bytes // len(stages))
    measured = f"{median:.0f} µs beyond computing; bare sockets and reading as much memory: {floor:.0f}"
    return Outcome("loopback, per stage and token, µs", measured, median, 300, at_most=True)


SCENARIOS: dict[str, Callable[[Bench], Awaitable[Outcome]]] = {
    "prompt": prompt_over_two,
    "requests": eight_requests,
    "same": same_texts,
    "beside": beside_a_long_prompt,
    "waiting": waiting,
    "links": behind_slow_links,
    "speculate": guessing,
    "wire": int8_on_the_wire,
    "turn": second_turn,
    "overhead": overhead,
    "tls": encrypted,
    "loading": loading,
    "memory": resident,
    "alternating": alternating,
    "api": api_load,
    "api-overhead": api_overhead,
}


def run_scenarios(names: Sequence[str], bench: Bench) -> list[Outcome]:
    """Those that are named, one after another; stderr tells which one runs, and how each went."""
    outcomes = []
    for i, name in enumerate(names, 1):
        scenario = SCENARIOS[name]
        click.echo(f"{i} of {len(names)}: {name}: {scenario.__doc__}", err=True)
        started = time.perf_counter()
        outcome = asyncio.run(scenario(bench))  # type: ignore[arg-type]
        took = time.perf_counter() - started
        figure = f"{three_digits(outcome.figure)}, bar {outcome.limit}"
        click.echo(f"  {outcome.verdict}: {figure} ({outcome.measured}); took {took:.0f} s", err=True)
        outcomes.append(outcome)
    return outcomes


def scenario_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """A table for a person."""
    rows = [["scenario", "measured", "figure", "bar", ""]]
    rows += [[o.name, o.measured, three_digits(o.figure), o.limit, o.verdict] for o in outcomes]
    return columns(rows)
