"""What is lost is made good: workers that go, come back, freeze, or lose their way to one another."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import GREEDY, NoText, cpu_thread, greedy_ids, pipeline_over, serving
from relay import Relay

from cake.dialling import Patience
from cake.errors import NodeLostError
from cake.generator import Generator
from cake.links import connect_peer as really_connect
from cake.model.batch import Batch, Segment
from cake.model.sampling import SamplingParams
from cake.net.connection import Connection
from cake.net.tls import Credentials
from cake.pipeline import Pipeline, open_pipeline
from cake.protocol.frames import Frame
from cake.protocol.messages import Link
from cake.remote import RemoteWorker
from cake.routes import Recovery
from cake.session import Session
from cake.stage import Computed, LocalStage
from cake.topology import Node, Topology
from cake.visit import Service
from cake.weights.checkpoint import Checkpoint
from cake.worker import Worker

FIRST, SECOND = range(0, 3), range(3, 6)
PROMPT = [5, 17, 99, 3, 42, 7]
SAMPLED = SamplingParams(temperature=1, seed=7)
N = 24
QUICK = Patience(total=5, first_pause=0.02, longest_pause=0.1, dead_after=0.5)


@pytest.fixture(autouse=True)
def lively(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of silence is long here."""
    monkeypatch.setattr("cake.net.connection.ALIVE_EVERY_S", 0.05)


def generator_of(pipeline: Pipeline) -> Generator:
    """Letters instead of text."""
    return Generator(pipeline, NoText(), frozenset())  # type: ignore[arg-type]


@asynccontextmanager
async def master_over(
    folder: Path, *nodes: Node, recovery: Recovery | None = None, patience: Patience = QUICK
) -> AsyncIterator[Pipeline]:
    topology = Topology({node.name: node for node in nodes})
    checkpoint = Checkpoint(folder)
    pipeline = await open_pipeline(checkpoint, topology, cpu_thread(), 512, patience, recovery=recovery)
    try:
        yield pipeline
    finally:
        await pipeline.close()


@asynccontextmanager
async def behind_relay(node: Node) -> AsyncIterator[tuple[Node, Relay]]:
    async with Relay((node.host, node.port)) as relay:
        yield replace(node, host=relay.address[0], port=relay.address[1]), relay


async def ids_with(
    pipeline: Pipeline, fault: Callable[[int], object], sampling: SamplingParams = GREEDY, n: int = N
) -> list[int]:
    """The ids generated while `fault` is called after every token with the number of tokens so far."""
    ids: list[int] = []
    generator = generator_of(pipeline)
    async for piece in generator.generate(Session(), PROMPT, sampling, n):
        ids.append(piece.token)
        result = fault(len(ids))
        if asyncio.iscoroutine(result):
            await result
    return ids


@pytest.fixture
async def expected(tiny_model: Path) -> dict[str, list[int]]:
    """What is generated here, by how it is sampled."""
    async with pipeline_over(tiny_model) as pipeline:
        return {
            "greedy": await ids_with(pipeline, lambda _: None),
            "sampled": await ids_with(pipeline, lambda _: None, SAMPLED),
        }


@pytest.mark.parametrize(("name", "sampling"), [("greedy", GREEDY), ("sampled", SAMPLED)])
async def test_a_replica_goes_on_where_a_worker_was_lost(
    tiny_model: Path, expected: dict[str, list[int]], name: str, sampling: SamplingParams
) -> None:
    async with AsyncExitStack() as stack:
        dying = AsyncExitStack()
        first = await stack.enter_async_context(serving(tiny_model, "first", FIRST))
        second = await dying.enter_async_context(serving(tiny_model, "second", SECOND))
        spare = replace(await stack.enter_async_context(serving(tiny_model, "spare", SECOND)), replica=True)
        pipeline = await stack.enter_async_context(master_over(tiny_model, first, second, spare))
        ids = await ids_with(pipeline, lambda n: dying.aclose() if n == 9 else None, sampling)
        assert ids == expected[name]
        tokens = {stage.node: stage.stats.tokens for stage in pipeline.stages}
        assert tokens["second"] >= 9
        assert tokens["spare"] >= N - 9


THIRDS = {"first": range(0, 2), "second": range(2, 4), "third": range(4, 6)}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Tokens by the first block of the workers' stages, as they count them."""

    def compute(self: LocalStage, batch: Batch) -> Computed:
        result = really_compute(self, batch)
        tokens[self.blocks.start] += len(batch.hidden)
        return result

    tokens: Counter[int] = Counter()
    really_compute = LocalStage._compute
    monkeypatch.setattr(LocalStage, "_compute", compute)
    return tokens


@pytest.mark.parametrize(("name", "sampling"), [("greedy", GREEDY), ("sampled", SAMPLED)])
@pytest.mark.parametrize("lost", range(3))
async def test_workers_behind_the_one_that_was_lost_do_not_compute_again(
    tiny_model: Path,
    expected: dict[str, list[int]],
    computed: Counter[int],
    lost: int,
    name: str,
    sampling: SamplingParams,
) -> None:
    computed.clear()
    async with AsyncExitStack() as stack:
        dying, nodes = AsyncExitStack(), list[Node]()
        for i, (node, span) in enumerate(THIRDS.items()):
            where = dying if i == lost else stack
            nodes.append(await where.enter_async_context(serving(tiny_model, node, span)))
        spare = await stack.enter_async_context(serving(tiny_model, "spare", nodes[lost].spans[0]))
        topology = [*nodes, replace(spare, replica=True)]
        pipeline = await stack.enter_async_context(master_over(tiny_model, *topology))
        ids = await ids_with(pipeline, lambda n: dying.aclose() if n == 9 else None, sampling)
    assert ids == expected[name]
    usual, replayed = len(PROMPT) + N - 1, len(PROMPT) + 8
    more = [computed[span.start] - usual for span in THIRDS.values()]
    assert more == [replayed] * (lost + 1) + [0] * (2 - lost)


async def test_a_worker_behind_one_that_comes_back_again_and_again_computes_nothing_twice(
    tiny_model: Path, expected: dict[str, list[int]], computed: Counter[int]
) -> None:
    computed.clear()
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(serving(tiny_model, name, span)) for name, span in THIRDS.items()
        ]
        nodes[1], relay = await stack.enter_async_context(behind_relay(nodes[1]))
        pipeline = await stack.enter_async_context(master_over(tiny_model, *nodes))

        async def cut_and_restore() -> None:
            relay.cut()
            asyncio.get_running_loop().call_later(0.3, relay.restore)

        ids = await ids_with(pipeline, lambda n: cut_and_restore() if n in (5, 11) else None)
    assert ids == expected["greedy"]
    assert computed[4] <= len(PROMPT) + N - 1 + 2, "and what was on its way when it was cut"


@pytest.fixture
def leave(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Awaitable[None]]:
    """Lets the worker of that node leave, and waits until its master has heard of it."""

    def recorded(service: Service, *allowed: Any) -> Worker:
        workers[service.node] = Worker(service, *allowed)
        return workers[service.node]

    def settled(self: RemoteWorker, frame: Frame) -> None:
        settle(self, frame)
        if self.leaving:
            heard.set()

    async def drain(name: str) -> None:
        task = asyncio.create_task(workers[name].drain(1000))
        tasks.append(task)
        await asyncio.wait_for(heard.wait(), 30)

    workers: dict[str, Worker] = {}
    tasks: list[asyncio.Task[None]] = []
    heard, settle = asyncio.Event(), RemoteWorker._settle
    monkeypatch.setattr("conftest.Worker", recorded)
    monkeypatch.setattr(RemoteWorker, "_settle", settled)
    return drain


async def test_a_session_leaves_a_worker_that_is_leaving(
    tiny_model: Path, expected: dict[str, list[int]], leave: Callable[[str], Awaitable[None]]
) -> None:
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(serving(tiny_model, "first", FIRST))]
        for name in ("second", "spare"):
            node = await stack.enter_async_context(serving(tiny_model, name, SECOND))
            nodes.append(replace(node, replica=True))
        pipeline = await stack.enter_async_context(master_over(tiny_model, *nodes))
        assert await ids_with(pipeline, lambda n: leave("second") if n == 9 else None) == expected["greedy"]
        await greedy_ids(pipeline, PROMPT, 2)
        tokens = {stage.node: stage.stats.tokens for stage in pipeline.stages}
        assert tokens["second"] == len(PROMPT) + 8, "nor does another session begin there"
        assert tokens["spare"] == len(PROMPT) + N - 1 + len(PROMPT) + 1


async def test_a_session_stays_with_a_worker_that_is_leaving_if_nobody_else_serves_its_blocks(
    tiny_model: Path, expected: dict[str, list[int]], leave: Callable[[str], Awaitable[None]]
) -> None:
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(serving(tiny_model, "second", SECOND))]
        for name in ("a", "b"):
            node = await stack.enter_async_context(serving(tiny_model, name, FIRST))
            nodes.append(replace(node, replica=True))
        pipeline = await stack.enter_async_context(master_over(tiny_model, *nodes))
        assert await ids_with(pipeline, lambda n: leave("second") if n == 9 else None) == expected["greedy"]
        tokens = {stage.node: stage.stats.tokens for stage in pipeline.stages}
        assert tokens["second"] == len(PROMPT) + N - 1
        assert sorted((tokens["a"], tokens["b"])) == [0, len(PROMPT) + N - 1], "and moves nowhere else for it"


async def test_sessions_are_spread_over_replicas_and_their_texts_are_the_same(
    tiny_model: Path, expected: dict[str, list[int]]
) -> None:
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(serving(tiny_model, "first", FIRST))]
        for name in ("a", "b"):
            node = await stack.enter_async_context(serving(tiny_model, name, SECOND))
            nodes.append(replace(node, replica=True))
        pipeline = await stack.enter_async_context(master_over(tiny_model, *nodes))
        generator = generator_of(pipeline)

        async def answer() -> list[int]:
            return [piece.token async for piece in generator.generate(Session(), PROMPT, GREEDY, N)]

        texts = await asyncio.gather(*(answer() for _ in range(4)))
        assert texts == [expected["greedy"]] * 4
        tokens = {stage.node: stage.stats.tokens for stage in pipeline.stages}
        assert tokens["a"] == tokens["b"] > 0


async def test_parts_of_a_session_that_come_together_go_along_one_route(tiny_model: Path) -> None:
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(serving(tiny_model, "first", FIRST))]
        for name in ("a", "b"):
            node = await stack.enter_async_context(serving(tiny_model, name, SECOND))
            nodes.append(replace(node, replica=True))
        routes = (await stack.enter_async_context(master_over(tiny_model, *nodes)))._routes
        routes._built.clear()  # so that choosing one takes a while
        parts = [Segment(1, 0, 4), Segment(1, 4, 4), Segment(1, 8, 4)]
        assert len(set(await asyncio.gather(*map(routes.of, parts)))) == 1


async def test_eight_requests_survive_the_loss_of_a_replica(
    tiny_model: Path, expected: dict[str, list[int]]
) -> None:
    async with AsyncExitStack() as stack:
        dying = AsyncExitStack()
        a = replace(await dying.enter_async_context(serving(tiny_model, "a", range(6))), replica=True)
        b = replace(await stack.enter_async_context(serving(tiny_model, "b", range(6))), replica=True)
        pipeline = await stack.enter_async_context(master_over(tiny_model, a, b))
        generator, count = generator_of(pipeline), itertools.count()

        async def answer() -> list[int]:
            ids = []
            async for piece in generator.generate(Session(), PROMPT, GREEDY, N):
                ids.append(piece.token)
                if next(count) == 60:
                    await dying.aclose()
            return ids

        assert await asyncio.gather(*(answer() for _ in range(8))) == [expected["greedy"]] * 8


async def test_a_worker_that_comes_back_is_given_the_tokens_again(
    tiny_model: Path, expected: dict[str, list[int]]
) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(serving(tiny_model, "first", FIRST))
        second = await stack.enter_async_context(serving(tiny_model, "second", SECOND))
        node, relay = await stack.enter_async_context(behind_relay(second))
        pipeline = await stack.enter_async_context(master_over(tiny_model, first, node))

        async def cut_and_restore() -> None:
            relay.cut()
            asyncio.get_running_loop().call_later(0.3, relay.restore)

        ids = await ids_with(pipeline, lambda n: cut_and_restore() if n in (5, 11) else None)
        assert ids == expected["greedy"]


async def test_a_link_that_freezes_is_noticed(tiny_model: Path, expected: dict[str, list[int]]) -> None:
    async with AsyncExitStack() as stack:
        second = await stack.enter_async_context(serving(tiny_model, "second", SECOND))
        node, relay = await stack.enter_async_context(behind_relay(second))
        pipeline = await stack.enter_async_context(master_over(tiny_model, node))

        async def freeze() -> None:
            relay.freeze()
            asyncio.get_running_loop().call_later(2, relay.thaw)

        assert await ids_with(pipeline, lambda n: freeze() if n == 5 else None) == expected["greedy"]


async def test_the_master_takes_over_what_nobody_serves(
    tiny_model: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cake.routes.ADOPT_AFTER_S", 0.1)
    async with AsyncExitStack() as stack:
        dying = AsyncExitStack()
        first = await stack.enter_async_context(serving(tiny_model, "first", FIRST))
        second = await dying.enter_async_context(serving(tiny_model, "second", SECOND))
        recovery = Recovery(rejoin_timeout=20, adopt=True)
        pipeline = await stack.enter_async_context(master_over(tiny_model, first, second, recovery=recovery))
        ids = await ids_with(pipeline, lambda n: dying.aclose() if n == 9 else None)
        assert ids == expected["greedy"]
        assert [stage.node for stage in pipeline.stages] == ["first", "second", "master"]


async def test_a_request_ends_when_nobody_comes_and_the_next_one_finds_who_came(
    tiny_model: Path, expected: dict[str, list[int]]
) -> None:
    async with AsyncExitStack() as stack:
        second = await stack.enter_async_context(serving(tiny_model, "second", SECOND))
        node, relay = await stack.enter_async_context(behind_relay(second))
        recovery = Recovery(rejoin_timeout=0.2)
        pipeline = await stack.enter_async_context(master_over(tiny_model, node, recovery=recovery))
        with pytest.raises(NodeLostError, match=r"nobody has served blocks 3-5 for .* s"):
            await ids_with(pipeline, lambda n: relay.cut() if n == 3 else None)
        relay.restore()
        await pipeline.mend()
        assert await greedy_ids(pipeline, PROMPT, N) == expected["greedy"]


async def test_a_broken_link_between_workers_is_made_anew(
    tiny_model: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    links: list[Connection] = []

    async def connect_peer(message: Link, credentials: Credentials | None) -> Connection:
        links.append(await really_connect(message, credentials))
        return links[-1]

    monkeypatch.setattr("cake.links.connect_peer", connect_peer)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(serving(tiny_model, "first", FIRST))
        second = await stack.enter_async_context(serving(tiny_model, "second", SECOND))
        pipeline = await stack.enter_async_context(master_over(tiny_model, first, second))
        ids = await ids_with(pipeline, lambda n: links[-1].abort() if n in (5, 11) else None)
        assert ids == expected["greedy"]
        assert len(links) == 3
        tokens = [stage.stats.tokens for stage in pipeline.stages]
        assert max(tokens) <= len(PROMPT) + N + 2  # nothing but what was on its way is computed again


async def test_a_link_that_cannot_be_made_anew_is_done_without(
    tiny_model: Path,
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    links: list[Connection] = []

    async def connect_peer(message: Link, credentials: Credentials | None) -> Connection:
        if links:
            raise ConnectionRefusedError(111, "refused")
        links.append(await really_connect(message, credentials))
        return links[-1]

    monkeypatch.setattr("cake.links.connect_peer", connect_peer)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(serving(tiny_model, "first", FIRST))
        second = await stack.enter_async_context(serving(tiny_model, "second", SECOND))
        pipeline = await stack.enter_async_context(master_over(tiny_model, first, second))
        assert await ids_with(pipeline, lambda n: links[-1].abort() if n == 5 else None) == expected["greedy"]
    assert "worker 'first' cannot reach worker 'second'" in caplog.text
