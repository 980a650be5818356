"""What a cluster key costs: tokens per second with it, inside TLS, by those of plain connections."""

import statistics
import time
from collections.abc import AsyncIterator

from trial import GREEDY, Bench, Outcome, first_token, in_turn

from cake.generator import Generator
from cake.session import Session

KEY = "a key for this measurement, and no other"
GENERATION, PROMPT = 0.97, 0.9


async def encrypted(bench: Bench, n_prompt: int = 512, n_tokens: int = 24) -> Outcome:
    """Two workers with a cluster key, by two without: single tokens, and a prompt."""
    async with bench.cluster(2) as plain, bench.cluster(2, KEY) as keyed:
        tokens = await alternating_tokens(bench, n_tokens, plain, keyed)
        prompt = bench.prompt(n_prompt)

        async def cold(generator: Generator) -> float:
            bench.begin(generator.pipeline)
            session = Session()
            took = await first_token(generator, session, prompt)
            await generator.close_session(session)
            return took

        prompts = await in_turn(bench.runs, lambda: cold(plain), lambda: cold(keyed))
    return encryption_outcome(tokens, prompts, n_prompt)


async def alternating_tokens(bench: Bench, n: int, *generators: Generator) -> list[float]:
    """Median seconds of a token of each, one of one after one of the other.

    So whatever slows this machine for a while slows all of them.
    """
    seconds: list[list[float]] = [[] for _ in generators]
    for run in range(bench.runs + 1):
        sessions = [Session() for _ in generators]
        answers = [
            generator.generate(session, bench.prompt(16), GREEDY, n + 1)
            for generator, session in zip(generators, sessions, strict=True)
        ]
        for token in range(n + 1):
            for answer, took in zip(answers, seconds, strict=True):
                passed = await _seconds(answer)
                if run and token:  # the first run is not counted, nor are prompts
                    took.append(passed)
        for generator, answer, session in zip(generators, answers, sessions, strict=True):
            await answer.aclose()
            await generator.close_session(session)
    return [statistics.median(took) for took in seconds]


async def _seconds(pieces: "AsyncIterator[object]") -> float:
    started = time.perf_counter()
    await anext(pieces)
    return time.perf_counter() - started


def encryption_outcome(tokens: list[float], prompts: list[float], n_prompt: int) -> Outcome:
    """Of seconds for a token and for a prompt, plain and with a key."""
    share = prompts[0] / prompts[1]
    measured = f"{1 / tokens[0]:.2f} tokens/s plain, {1 / tokens[1]:.2f} with TLS; a prompt of {n_prompt} "
    measured += f"{n_prompt / prompts[0]:.1f} and {n_prompt / prompts[1]:.1f} tokens/s: {share:.3f}"
    wrong = "" if share >= PROMPT else f"prompts fall below {PROMPT}"
    name = "generation with TLS and key, by plain"
    return Outcome(name, measured, tokens[0] / tokens[1], GENERATION, wrong=wrong)
