"""Chains: workers that hand on to one another, and what becomes of a link that cannot be, or breaks."""

import contextlib
import itertools
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PATIENT, cpu_thread, loaded_stage, serving
from msgspec import structs
from test_connection import soon
from test_worker import HELLO, ask, forward, raw

from cake.chain import Chain, link_stages
from cake.dialling import connect_worker
from cake.errors import NodeError, SessionLostError
from cake.model.batch import Batch, Segment
from cake.pipeline import expectation
from cake.protocol.messages import Failed, Forget, Goodbye, Hop, Link, Linked, Result, Welcome
from cake.remote import RemoteStage
from cake.stage import LocalStage
from cake.topology import Node
from cake.weights.checkpoint import Checkpoint

SPANS = [range(0, 2), range(2, 3), range(3, 6)]


@pytest.fixture
async def every_block(tiny_model: Path) -> AsyncIterator[LocalStage]:
    """All blocks in this process: what right results are."""
    thread = cpu_thread()
    yield await loaded_stage(Checkpoint(tiny_model), range(0, 6), thread)
    thread.close()


def states(n_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_tokens, 64, generator=torch.Generator().manual_seed(seed))


@asynccontextmanager
async def three(folder: Path) -> AsyncIterator[list[RemoteStage]]:
    """Three workers that a master has greeted, not linked yet."""
    async with AsyncExitStack() as stack:
        stages = []
        for i, span in enumerate(SPANS):
            node = await stack.enter_async_context(serving(folder, f"w{i}", span))
            worker = await connect_worker(node, expectation(Checkpoint(folder), node), PATIENT)
            stack.push_async_callback(worker.close)
            stages.append(RemoteStage(worker, span))
        yield stages


async def run(chains: list[Chain], position: int, hidden: torch.Tensor, session: int = 7) -> torch.Tensor:
    for chain in chains:
        segments = (Segment(session, position, len(hidden)),)
        hidden = (await soon(chain.forward(Batch(hidden, segments)))).hidden
    return hidden


async def whole(stage: LocalStage, position: int, hidden: torch.Tensor) -> torch.Tensor:
    return (await stage.forward(Batch(hidden, (Segment(7, position, len(hidden)),)))).hidden


@contextlib.contextmanager
def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener.getsockname()[1]


async def test_one_message_in_and_one_out(tiny_model: Path, every_block: LocalStage) -> None:
    async with three(tiny_model) as stages:
        (chain,) = await soon(link_stages(stages))
        for position, n in ((0, 5), (5, 1), (3, 4)):
            assert torch.equal(
                await run([chain], position, states(n, position)),
                await whole(every_block, position, states(n, position)),
            )
        connections = [stage.worker._connection for stage in stages]
        received = [connection.bytes_received for connection in connections]
        sent = [connection.bytes_sent for connection in connections]
        await run([chain], 7, states(2))
        assert [c.bytes_received > r for c, r in zip(connections, received, strict=True)] == [0, 0, 1]
        assert [c.bytes_sent > s for c, s in zip(connections, sent, strict=True)] == [1, 0, 0]
        for stage, following in itertools.pairwise(stages):
            assert stage.stats.bytes_received == following.stats.bytes_sent
        for stage in stages:
            assert (stage.stats.messages, stage.stats.tokens) == (4, 12)
            assert stage.stats.compute_s > 0
        assert 0 < chain.network_s <= sum(stage.stats.network_s for stage in stages) / 4


async def test_a_worker_that_cannot_reach_the_next_is_relayed_for(
    tiny_model: Path, every_block: LocalStage, caplog: pytest.LogCaptureFixture
) -> None:
    async with three(tiny_model) as stages:
        with closed_port() as port:
            real = stages[1].worker.node
            stages[1].worker.node = replace(real, port=port)
            chains = await soon(link_stages(stages))
        assert [[stage.node for stage in chain.stages] for chain in chains] == [["w0"], ["w1", "w2"]]
        assert torch.equal(await run(chains, 0, states(3)), await whole(every_block, 0, states(3)))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "worker 'w0' cannot reach worker 'w1'" in warning
    assert "this master carries between them" in warning


async def test_another_worker_at_the_address_is_found_out(tiny_model: Path, caplog) -> None:
    async with three(tiny_model) as stages:
        stages[1].worker.node = replace(stages[1].worker.node, port=stages[2].worker.node.port)
        chains = await soon(link_stages(stages))
        assert len(chains) == 2
    assert "this worker is 'w2', not 'w1'" in caplog.text


async def test_what_a_later_stage_has_lost_reaches_the_master(tiny_model: Path) -> None:
    async with three(tiny_model) as stages:
        (chain,) = await soon(link_stages(stages))
        await run([chain], 0, states(4))
        await stages[2].forget([7])
        with pytest.raises(SessionLostError) as lost:
            await run([chain], 4, states(1))
        assert (lost.value.session, lost.value.held) == (7, 0)
        with pytest.raises(NodeError, match="do not fit into the context"):
            await run([chain], 0, states(513))


async def test_a_chain_may_end_at_any_of_its_stages(tiny_model: Path, every_block: LocalStage) -> None:
    async with three(tiny_model) as stages:
        (chain,) = await soon(link_stages(stages))
        assert chain.until(0) is None
        names = [[stage.node for stage in chain.until(block).stages] for block in (1, 2, 3, 4, 5, 6)]
        assert names == [
            ["w0"],
            ["w0"],
            ["w0", "w1"],
            ["w0", "w1", "w2"],
            ["w0", "w1", "w2"],
            ["w0", "w1", "w2"],
        ]
        short = await run([chain.until(3)], 0, states(5))
        apart = await run([Chain([stage]) for stage in stages[:2]], 0, states(5), session=8)
        assert torch.equal(short, apart)
        assert [stage.stats.tokens for stage in stages] == [10, 10, 0]


async def test_a_session_that_begins_as_a_copy(tiny_model: Path, every_block: LocalStage) -> None:
    async with three(tiny_model) as stages:
        (chain,) = await soon(link_stages(stages))
        await run([chain], 0, states(6))
        copied = Batch(states(2, 5), (Segment(8, 4, 2, 7),))
        got = (await soon(chain.forward(copied))).hidden
        await whole(every_block, 0, states(6))
        beyond = await whole(every_block, 4, states(2, 5))
        assert torch.equal(got, beyond)
        assert torch.equal(
            await run([chain], 6, states(1, 9)),  # the source is as it was
            await _after(every_block, [states(6), states(1, 9)]),
        )
        with pytest.raises(SessionLostError) as lost:
            await soon(chain.forward(Batch(states(1), (Segment(9, 3, 1, 99),))))
        assert (lost.value.session, lost.value.held) == (9, 0)


async def _after(stage: LocalStage, parts: list[torch.Tensor]) -> torch.Tensor:
    position = 0
    for part in parts:
        hidden = await whole(stage, position, part)
        position += len(part)
    return hidden


async def test_the_next_worker_is_gone(tiny_model: Path) -> None:
    async with AsyncExitStack() as stack:
        stages = []
        leaving = AsyncExitStack()
        for i, span in enumerate(SPANS[:2]):
            node = await (leaving if i else stack).enter_async_context(serving(tiny_model, f"w{i}", span))
            worker = await connect_worker(node, expectation(Checkpoint(tiny_model), node), PATIENT)
            stack.push_async_callback(worker.close)
            stages.append(RemoteStage(worker, span))
        (chain,) = await soon(link_stages(stages))
        await run([chain], 0, states(1))
        await leaving.aclose()
        with pytest.raises(NodeError, match="w1"):
            await run([chain], 1, states(1))


# What a stranger, or a master that errs, may say about links.


@pytest.fixture
async def node(tiny_model: Path) -> AsyncIterator[Node]:
    async with serving(tiny_model, "porch", range(0, 3)) as node:
        yield node


async def test_a_visit_that_nobody_makes_is_refused(node: Node) -> None:
    async with raw(node) as stranger:
        answer = await ask(stranger, structs.replace(HELLO, visit="0" * 32))
    assert answer == Goodbye("no master is here by that visit")


async def test_who_speaks_for_another_may_only_forward(node: Node) -> None:
    async with raw(node) as master:
        welcome = await ask(master, HELLO)
        assert isinstance(welcome, Welcome)
        async with raw(node) as peer:
            greeting = await ask(peer, structs.replace(HELLO, visit=welcome.visit))
            assert isinstance(greeting, Welcome)
            assert greeting.visit == ""
            peer.say(forward((0, 0, 1)))
            assert isinstance(await master.hear(), Result)
            assert await ask(peer, Forget((0,))) == Goodbye("a forget message is for masters to say")
        assert isinstance(await ask(master, forward((0, 1, 1))), Result), "the master goes on"


async def test_a_route_over_a_link_that_is_not_there(node: Node) -> None:
    async with raw(node, HELLO) as master:
        nowhere = structs.replace(forward((0, 0, 1)), route=(Hop(3, 3),))
        assert await ask(master, nowhere) == Goodbye("there is no link 3 here")


async def test_links_that_fail_leave_the_conversation(node: Node) -> None:
    async with raw(node, HELLO) as master:
        with closed_port() as port:
            for host in ("127.0.0.1", "no.such.host.invalid", "\0", "x" * 300):
                failed = await ask(master, Link(1, "attic", host, port, "v"))
                assert isinstance(failed, Failed)
                assert failed.id == 1
        assert isinstance(await ask(master, Link(1, "attic", "127.0.0.1", 2**40, "v")), Failed)
        refused = await ask(master, Link(1, "porch", node.host, node.port, "v"))
        assert refused == Failed(1, "it refused: no master is here by that visit")
        assert isinstance(await ask(master, forward((0, 0, 1))), Result)


async def test_a_link_number_twice(node: Node) -> None:
    async with raw(node) as master, raw(node) as other:
        welcome = await ask(other, HELLO)
        assert isinstance(welcome, Welcome)
        await ask(master, HELLO)
        link = Link(1, "porch", node.host, node.port, welcome.visit)
        assert await ask(master, link) == Linked(1)
        assert await ask(master, link) == Failed(1, "there is a link 1 already")
