"""The scenarios of slow links: what a token costs, guessing ahead, and fewer bits on the wire."""

import statistics
import time
from collections.abc import Sequence

from cluster import relayed, running_workers
from slow_links import one_prompt, pipeline_in, slow_workers
from trial import GREEDY, Bench, Outcome, gaps, generator_over, in_turn, moments

from cake.generator import Generator
from cake.model.linear import Placement
from cake.pipeline import Pipeline
from cake.session import Session
from cake.speculation import NGrams
from cake.weights.checkpoint import open_checkpoint

TEXT = (
    "The lighthouse keeper climbed the narrow stairs every evening at dusk. He carried a small brass lamp "
    "and a tin of oil, and he counted each of the one hundred and forty steps aloud. From the top he could "
    "see the harbour, the fishing boats coming home, and the long grey line of the mainland. When the lamp "
    "was lit he wrote the date, the weather and the names of the ships into a thick leather book."
)
PROMPTS = {
    "repeat": "Repeat the following text word for word: ",
    "quote": "Summarise the following text in one sentence, and then quote it in full: ",
}


async def behind_slow_links(bench: Bench, n_workers: int = 4, delay_ms: int = 20, n: int = 24) -> Outcome:
    """What a token takes beyond N + 1 trips and the computing."""
    with (
        running_workers(bench.checkpoint, n_workers, 1, bench.placement) as workers,
        relayed(workers, "none", f"{delay_ms}ms") as distant,
    ):
        async with generator_over(distant, bench.checkpoint, bench.placement) as generator:
            await moments(generator, bench.prompt(16), 4)
            bench.begin(generator.pipeline)
            stages = generator.pipeline.stages
            before = sum(stage.stats.network_s for stage in stages)
            times = await moments(generator, bench.prompt(16), n)
            # Of the same tokens, as the machine is not equally fast from one moment to the next.
            network = (sum(stage.stats.network_s for stage in stages) - before) / n
    token = statistics.median(gaps(times[2:]))
    compute, trips = token - network, (n_workers + 1) * delay_ms / 1e3
    measured = f"{1e3 * token:.1f} ms a token; trips {1e3 * trips:.0f}, computing {1e3 * compute:.1f}"
    limit = trips + compute + 0.005
    return Outcome(f"{n_workers} workers behind {delay_ms} ms, s", measured, token, limit, at_most=True)


async def guessing(bench: Bench, n_workers: int = 4, delay_ms: int = 20, n: int = 120) -> Outcome:
    """Tokens per second with n-grams proposed, by those without, where the demo model repeats a text."""
    checkpoint = open_checkpoint(None, lambda _: True)  # random weights would not repeat
    with (
        running_workers(checkpoint, n_workers, 1, bench.placement) as workers,
        relayed(workers, "none", f"{delay_ms}ms") as topology,
    ):
        async with generator_over(topology, checkpoint, bench.placement) as endless:
            parts = (endless.pipeline, endless.tokenizer, checkpoint.stop_ids)
            plain, guesser = Generator(*parts), Generator(*parts, new_proposer=NGrams)
            found = {
                name: await guessed(bench, plain, guesser, text + TEXT, n) for name, text in PROMPTS.items()
            }
    return guessing_outcome(f"the demo model repeats a text, {n_workers} workers behind {delay_ms} ms", found)


Found = tuple[float, float, bool]  # tokens per second without and with guesses, and whether they are the same


async def guessed(bench: Bench, plain: Generator, guesser: Generator, request: str, n: int) -> Found:
    """One request, answered with guesses and without in turns."""
    prompt = plain.tokenizer.encode_chat([{"role": "user", "content": request}])
    answers: set[tuple[int, ...]] = set()

    async def speed(generator: Generator) -> float:
        bench.begin(generator.pipeline)
        tokens, tokens_per_s = await answered(generator, prompt, n)
        answers.add(tokens)
        return tokens_per_s

    without, ahead = await in_turn(bench.runs, lambda: speed(plain), lambda: speed(guesser))
    return without, ahead, len(answers) == 1


async def answered(generator: Generator, prompt: Sequence[int], n: int) -> tuple[tuple[int, ...], float]:
    """At most `n` tokens, and how many came per second after the first."""
    session, tokens, times = Session(), [], []
    async for piece in generator.generate(session, prompt, GREEDY, n):
        times.append(time.perf_counter())
        tokens.append(piece.token)
    await generator.close_session(session)
    return tuple(tokens), (len(tokens) - 1) / (times[-1] - times[0])


def guessing_outcome(name: str, found: dict[str, Found]) -> Outcome:
    """The worst of the requests counts."""
    measured = ", ".join(
        f"{request}: {plain:.1f} tokens/s without guesses, {ahead:.1f} with"
        for request, (plain, ahead, _) in found.items()
    )
    wrong = ", ".join(request for request, (_, _, same) in found.items() if not same)
    return Outcome(
        name,
        measured,
        min(ahead / plain for plain, ahead, _ in found.values()),
        3.0,
        wrong=f"other tokens than without guesses: {wrong}" if wrong else "",
    )


async def int8_on_the_wire(bench: Bench, n_tokens: int = 512, rate: str = "50mbit") -> Outcome:
    """Prompts of a model that waits for its links, in int8 on the wire by those in bfloat16."""
    placement = Placement(bench.placement.device, bench.placement.dtype)
    with slow_workers(None, rate, "0ms", placement) as thin:
        async with (
            pipeline_in(*thin, placement, "bfloat16", n_tokens) as two_bytes,
            pipeline_in(*thin, placement, "int8", n_tokens) as one_byte,
        ):

            async def speed(pipeline: Pipeline) -> float:
                bench.begin(pipeline)
                return await one_prompt(pipeline, n_tokens)

            wide, narrow = await in_turn(bench.runs, lambda: speed(two_bytes), lambda: speed(one_byte))
    measured = f"{wide:.0f} tokens/s in bfloat16, {narrow:.0f} in int8"
    return Outcome(
        f"prompt of {n_tokens} over {rate}, hidden size 2048, int8 by bfloat16", measured, narrow / wide, 1.7
    )
