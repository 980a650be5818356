"""What a master shows of a cluster whose workers come, work and go."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import GREEDY, NoText, pipeline_over, serving

from cake.cluster_view import ClusterView, Snapshot
from cake.generator import Generator
from cake.pipeline import Pipeline
from cake.session import Session

PROMPT = [1, 2, 3, 4, 5]


def new_generator(pipeline: Pipeline) -> Generator:
    return Generator(pipeline, NoText(), frozenset())  # type: ignore[arg-type]


async def generate(generator: Generator, n: int, session: Session | None = None) -> None:
    async for _ in generator.generate(session or Session(), PROMPT, GREEDY, n):
        pass


async def until(events: AsyncIterator[Snapshot], good: Callable[[Snapshot], bool]) -> Snapshot:
    """The first event that is as wanted."""

    async def look() -> Snapshot:
        async for event in events:
            if good(event):
                return event
        raise AssertionError("the events ended")

    return await asyncio.wait_for(look(), 30)


def node(event: Snapshot, name: str) -> dict[str, Any]:
    (only,) = [each for each in event["nodes"] if each["name"] == name]
    return only


async def test_a_snapshot_shows_who_serves_what(tiny_model: Path) -> None:
    async with AsyncExitStack() as stack:
        w0 = await stack.enter_async_context(serving(tiny_model, "w0", range(1, 3), range(5, 6)))
        pipeline = await stack.enter_async_context(pipeline_over(tiny_model, w0))
        view = ClusterView(new_generator(pipeline), "tiny")
        shown = view.snapshot()
        assert (shown["model"], shown["n_blocks"], shown["context"]) == ("tiny", 6, 512)
        master, worker = shown["nodes"]
        assert master["spans"] == [[0, 1], [3, 5]]
        assert master["holds"] == ["embedding", "head"]
        assert 0 < master["memory_used"] < master["memory_total"]
        assert worker["spans"] == [[1, 3], [5, 6]]
        assert (worker["address"], worker["state"]) == (w0.address, "up")
        assert (worker["device"], worker["dtype"]) == ("cpu", "float32")
        way = [(stage["node"], stage["span"]) for stage in shown["pipeline"]]
        assert way == [("master", [0, 1]), ("w0", [1, 3]), ("master", [3, 5]), ("w0", [5, 6])]
        master, worker = (await until(view.events(), lambda event: event["nodes"][1]["memory_used"]))["nodes"]
        assert worker["memory_total"] == master["memory_total"]  # they are one process
        assert worker["memory_used"] == pytest.approx(master["memory_used"], rel=0.5)
        assert all(stage["compute_ms"] is None and not stage["active"] for stage in shown["pipeline"])


async def test_work_shows_in_every_stage_and_stops_showing(tiny_model: Path) -> None:
    async with AsyncExitStack() as stack:
        w0 = await stack.enter_async_context(serving(tiny_model, "w0", range(3, 6)))
        pipeline = await stack.enter_async_context(pipeline_over(tiny_model, w0))
        generator = new_generator(pipeline)
        view = ClusterView(generator, "tiny")
        async with view.watched(), aclosing(view.events()) as events:
            working = asyncio.create_task(generate(generator, 400))
            event = await until(events, lambda event: event["rates"]["tokens_per_s"] > 0)
            here, there = event["pipeline"]
            assert here["active"]
            assert there["active"]
            assert here["compute_ms"] > 0
            assert here["network_ms"] == 0
            assert there["compute_ms"] > 0
            assert there["network_ms"] > 0
            assert here["bytes_per_s"] == 0
            assert there["bytes_per_s"] > 2 * 4 * 64 * event["rates"]["tokens_per_s"] * 0.5
            await working
            idle = await until(events, lambda event: event["rates"]["tokens_per_s"] == 0)
            assert idle["rates"]["sessions"] == 1
            assert idle["rates"]["requests"] == 0
            assert [stage["compute_ms"] for stage in idle["pipeline"]] == [None, None]
            assert not any(stage["active"] for stage in idle["pipeline"])


async def test_who_goes_is_lost_at_once(tiny_model: Path) -> None:
    async with AsyncExitStack() as stack:
        going = await stack.enter_async_context(AsyncExitStack())
        w0 = await going.enter_async_context(serving(tiny_model, "w0", range(6)))
        pipeline = await stack.enter_async_context(pipeline_over(tiny_model, w0))
        view = ClusterView(new_generator(pipeline), "tiny")
        async with view.watched(), aclosing(view.events()) as events:
            assert node(await anext(events), "w0")["state"] == "up"
            await going.aclose()
            lost = await asyncio.wait_for(anext(events), 0.4)  # before it is time to look again
            if node(lost, "w0")["state"] == "up":  # it was just time
                lost = await asyncio.wait_for(anext(events), 0.4)
            assert node(lost, "w0")["state"] == "lost"
            assert node(lost, "w0")["device"] == "cpu"  # as it was


async def test_a_stand_in_is_told_again_what_it_lacks_and_then_serves(tiny_model: Path) -> None:
    async with AsyncExitStack() as stack:
        dying = await stack.enter_async_context(AsyncExitStack())
        first = await stack.enter_async_context(serving(tiny_model, "first", range(3)))
        second = await dying.enter_async_context(serving(tiny_model, "second", range(3, 6)))
        spare = replace(
            await stack.enter_async_context(serving(tiny_model, "spare", range(3, 6))), replica=True
        )
        pipeline = await stack.enter_async_context(pipeline_over(tiny_model, first, second, spare))
        generator, session = new_generator(pipeline), Session()
        view = ClusterView(generator, "tiny")
        await generate(generator, 8, session)
        names = ("first", "second", "spare")
        async with view.watched(), aclosing(view.events()) as events:
            before = await anext(events)
            assert [stage["node"] for stage in before["pipeline"]] == ["first", "second"]
            assert [node(before, name)["state"] for name in names] == ["up", "up", "standby"]
            await dying.aclose()
            lost = await until(events, lambda event: node(event, "second")["state"] == "lost")
            assert lost["rates"]["replays"] == 0
            again = asyncio.create_task(generate(generator, 8, session))
            told = await until(events, lambda event: node(event, "spare")["state"] != "standby")
            assert [node(told, name)["state"] for name in names] == ["up", "lost", "replaying"]
            assert told["rates"]["replays"] == 1
            await again
            after = await until(events, lambda event: node(event, "spare")["state"] != "replaying")
            assert [node(after, name)["state"] for name in names] == ["up", "lost", "up"]
            assert [stage["node"] for stage in after["pipeline"]] == ["first", "spare"]


async def test_events_end_when_the_view_is_closed(tiny_model: Path) -> None:
    async with pipeline_over(tiny_model) as pipeline:
        view = ClusterView(new_generator(pipeline), "tiny")
        seen = [event async for event in _closing_after(view, 2)]
        assert [event["rates"]["sessions"] for event in seen] == [0, 0]
        assert seen[0]["at"] < seen[1]["at"]


async def _closing_after(view: ClusterView, n: int) -> AsyncIterator[Snapshot]:
    async with view.watched():
        async for event in view.events():
            yield event
            n -= 1
            if not n:
                view.close()
