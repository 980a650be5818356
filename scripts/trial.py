"""What every scenario is made of: a model under test, fresh workers, clocks, and an outcome.

Knows no scenario.
"""

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from cluster import running_workers

from cake.device import DeviceThread
from cake.dialling import Patience
from cake.generator import Generator
from cake.model.linear import Placement
from cake.model.sampling import SamplingParams
from cake.model.tokenizer import Tokenizer
from cake.net.tls import Credentials, new_credentials
from cake.pipeline import Pipeline, open_pipeline
from cake.session import Session
from cake.stage import Stage
from cake.topology import Topology
from cake.trace import start_tracing
from cake.weights.checkpoint import Checkpoint

GREEDY = SamplingParams(temperature=0, repeat_penalty=1)
CONTEXT = 4096
BITS = {"none": 16.0, "int8": 8.25, "int4": 4.5}  # of a weight


@dataclass(frozen=True)
class Outcome:
    """One scenario: what was measured, in words, and the figure that must reach (or stay below) a bar.

    Where something is `wrong`, no figure makes up for it.
    """

    name: str
    measured: str
    figure: float
    bar: float
    at_most: bool = False
    wrong: str = ""

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong and the bar is reached."""
        return not self.wrong and (self.figure <= self.bar if self.at_most else self.figure >= self.bar)

    @property
    def verdict(self) -> str:
        """In a few words."""
        return "holds" if self.holds else self.wrong or "falls short"

    @property
    def limit(self) -> str:
        """The bar, and on which side of it the figure should be."""
        return f"{'≤' if self.at_most else '≥'} {three_digits(self.bar)}"

    def as_json(self) -> dict[str, Any]:
        """For a machine to read."""
        return {**asdict(self), "holds": self.holds}


def three_digits(number: float) -> str:
    """A figure as a person reads it."""
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"


@dataclass
class Bench:
    """The model under test, how its numbers are kept, how many runs count, and whether they are traced."""

    checkpoint: Checkpoint
    placement: Placement
    runs: int
    traces: bool = False
    traced: Sequence[Stage] = field(default=())

    def prompt(self, n_tokens: int, seed: int = 0) -> list[int]:
        """Random tokens, the same for the same seed."""
        random = torch.Generator().manual_seed(seed)
        return torch.randint(self.checkpoint.config.vocab_size, (n_tokens,), generator=random).tolist()

    @property
    def weight_bytes(self) -> int:
        """Of all blocks, as the workers keep them."""
        stored = sum(map(self.checkpoint.bytes_of, range(self.checkpoint.config.n_blocks)))
        return round(stored * BITS[self.placement.quantize] / BITS["none"])

    def begin(self, pipeline: Pipeline) -> None:
        """A run begins: it is what a trace shows, until another one begins."""
        if self.traces:
            self.traced = pipeline.stages
            start_tracing(pipeline.stages)

    @contextlib.asynccontextmanager
    async def cluster(self, n_workers: int, cluster_key: str | None = None) -> AsyncIterator[Generator]:
        """A generator over fresh workers."""
        workers = running_workers(self.checkpoint, n_workers, 1, self.placement, cluster_key)
        credentials = new_credentials(cluster_key) if cluster_key else None
        with contextlib.ExitStack() as stack:
            # In a thread: meanwhile another cluster's master must go on saying that it is alive.
            topology = await asyncio.to_thread(stack.enter_context, workers)
            opening = generator_over(topology, self.checkpoint, self.placement, credentials)
            async with opening as generator:
                yield generator


@contextlib.asynccontextmanager
async def generator_over(
    topology: Topology,
    checkpoint: Checkpoint,
    placement: Placement,
    credentials: Credentials | None = None,
) -> AsyncIterator[Generator]:
    """A generator over these nodes, which no token stops."""
    context = min(checkpoint.config.context, CONTEXT)
    thread = DeviceThread(placement, 1)
    pipeline = await open_pipeline(checkpoint, topology, thread, context, Patience(), credentials=credentials)
    try:
        yield Generator(pipeline, Tokenizer(checkpoint.folder), frozenset())
    finally:
        await pipeline.close()


async def moments(generator: Generator, prompt: Sequence[int], n: int) -> list[float]:
    """When the request began, and when each of its `n` tokens came."""
    session = Session()
    pieces = generator.generate(session, prompt, GREEDY, n)
    times = [time.perf_counter()] + [time.perf_counter() async for _ in pieces]
    await generator.close_session(session)
    return times


async def first_token(generator: Generator, session: Session, prompt: Sequence[int]) -> float:
    """Seconds until a session that may hold some of the prompt has its first token."""
    started = time.perf_counter()
    async for _ in generator.generate(session, prompt, GREEDY, 1):
        pass
    return time.perf_counter() - started


async def in_turn(runs: int, *works: Callable[[], Awaitable[float]]) -> list[float]:
    """The median of each, run by run in turns, after one round that is not counted."""
    rounds = [[await work() for work in works] for _ in range(runs + 1)][1:]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def gaps(times: Sequence[float]) -> list[float]:
    """Seconds between neighbours."""
    return [after - before for before, after in itertools.pairwise(times)]
