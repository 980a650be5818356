"""A worker that will stop soon: it says so, and answers until it is quiet."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import serving
from test_connection import soon
from test_worker import HELLO, SPAN, ask, forward, raw

from cake.protocol.messages import (
    Leaving,
    Result,
)
from cake.stage import LocalStage
from cake.visit import Service
from cake.worker import Worker


@asynccontextmanager
async def draining(folder: Path, monkeypatch: pytest.MonkeyPatch, quiet: float, seconds: float):
    """A worker's node, and what makes it drain: a coroutine function that ends when it has."""

    def recorded(service: Service, *allowed: Any) -> Worker:
        workers.append(Worker(service, *allowed))
        return workers[-1]

    workers: list[Worker] = []
    monkeypatch.setattr("conftest.Worker", recorded)
    monkeypatch.setattr("cake.worker.QUIET_S", quiet)
    async with serving(folder, "porch", SPAN) as node:
        yield node, lambda: workers[0].drain(seconds)


async def test_a_worker_that_drains_says_so_and_answers_until_it_is_quiet(
    tiny_model: Path, monkeypatch
) -> None:
    async with (
        draining(tiny_model, monkeypatch, quiet=0.5, seconds=1000) as (node, drain),
        raw(node, HELLO) as master,
    ):
        assert isinstance(await ask(master, forward((0, 0, 4))), Result)
        drained = asyncio.create_task(drain())
        assert await master.hear() == Leaving()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(node.host, node.port)
        assert isinstance(await ask(master, forward((0, 4, 1))), Result)
        await soon(drained)


async def test_a_worker_that_drains_waits_for_what_it_computes(tiny_model: Path, monkeypatch) -> None:
    async def slow(self: LocalStage, *arguments) -> object:
        computing.set()
        await enough.wait()
        return await original(self, *arguments)

    original, computing, enough = LocalStage.answer, asyncio.Event(), asyncio.Event()
    monkeypatch.setattr(LocalStage, "answer", slow)
    async with (
        draining(tiny_model, monkeypatch, quiet=0.01, seconds=1000) as (node, drain),
        raw(node, HELLO) as master,
    ):
        master.say(forward((0, 0, 4)))
        await computing.wait()
        drained = asyncio.create_task(drain())
        done, _ = await asyncio.wait([drained], timeout=0.2)
        assert not done
        enough.set()
        assert [await master.hear(), type(await master.hear())] == [Leaving(), Result]
        await soon(drained)


async def test_a_worker_that_drains_waits_no_longer_than_it_was_told(tiny_model: Path, monkeypatch) -> None:
    async with (
        draining(tiny_model, monkeypatch, quiet=1000, seconds=0.05) as (node, drain),
        raw(node, HELLO) as master,
    ):
        await soon(drain())
        assert await master.hear() == Leaving()


async def test_a_worker_without_masters_has_drained(tiny_model: Path, monkeypatch) -> None:
    async with draining(tiny_model, monkeypatch, quiet=1000, seconds=1000) as (node, drain):
        async with raw(node, HELLO) as master:
            drained = asyncio.create_task(drain())
            assert await master.hear() == Leaving()
        await soon(drained)
