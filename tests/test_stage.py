"""The local stage: sessions addressed by position, batches of several, and forgetting."""

import asyncio
import time
from pathlib import Path

import pytest
import torch
from conftest import loaded_stage
from torch import Tensor
from torch.testing import assert_close

from cake.device import DeviceThread
from cake.errors import CakeError, SessionLostError
from cake.model.batch import Batch, Segment
from cake.protocol.tensors import to_wire
from cake.stage import LocalStage
from cake.weights.checkpoint import Checkpoint

SPAN = range(1, 4)


@pytest.fixture
async def stage(tiny_model: Path, thread: DeviceThread) -> LocalStage:
    """Blocks 1 to 3 of the tiny model."""
    return await loaded_stage(Checkpoint(tiny_model), SPAN, thread)


def states(n_tokens: int, seed: int = 0) -> Tensor:
    """Hidden states of so many tokens, the same for the same seed."""
    return torch.randn(n_tokens, 64, generator=torch.Generator().manual_seed(seed))


async def feed(stage: LocalStage, session: str, position: int, hidden: Tensor) -> Tensor:
    batch = Batch(hidden, (Segment(session, position, len(hidden)),))
    return (await stage.forward(batch)).hidden


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float32 sums, whose error grows with the largest value."""
    assert_close(actual, expected, atol=1e-5 * max(1.0, expected.abs().max().item()), rtol=0)


async def test_a_copy_of_no_tokens_needs_no_source(tiny_model: Path, thread: DeviceThread) -> None:
    stage = await loaded_stage(Checkpoint(tiny_model), range(0, 2), thread)
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    copied = await stage.forward(Batch(states, (Segment("copy", 0, 3, "nobody"),)))
    fresh = await stage.forward(Batch(states, (Segment("fresh", 0, 3),)))
    assert torch.equal(copied.hidden, fresh.hidden)
    assert list(stage._budget._last_used) == ["copy", "fresh"], "nobody is not remembered"


async def test_chunks_give_the_same_as_the_whole(stage: LocalStage) -> None:
    hidden = states(20)
    whole = await feed(stage, "whole", 0, hidden)
    for chunk in (1, 7, 19):
        name = f"by {chunk}"
        parts = [await feed(stage, name, at, hidden[at : at + chunk]) for at in range(0, 20, chunk)]
        assert_same(torch.cat(parts), whole)
    assert not torch.allclose(whole, hidden, atol=0.1)  # the blocks did something


@pytest.mark.parametrize("position", [0, 1, 6, 10])
async def test_rewinding_and_appending_is_as_from_scratch(stage: LocalStage, position: int) -> None:
    old, new = states(10), states(4, seed=1)
    await feed(stage, "rewound", 0, old)
    appended = await feed(stage, "rewound", position, new)
    scratch = await feed(stage, "scratch", 0, torch.cat([old[:position], new]))
    assert_same(appended, scratch[position:])
    more = states(1, seed=2)
    assert_same(
        await feed(stage, "rewound", position + 4, more), await feed(stage, "scratch", position + 4, more)
    )


async def test_what_was_rewound_is_gone(stage: LocalStage) -> None:
    await feed(stage, "a", 0, states(10))
    await feed(stage, "a", 3, states(2, seed=1))
    with pytest.raises(SessionLostError) as caught:
        await feed(stage, "a", 10, states(1))
    assert (caught.value.session, caught.value.held) == ("a", 5)


@pytest.mark.parametrize(("held", "position"), [(0, 1), (4, 5), (4, 400)])
async def test_more_than_is_held(stage: LocalStage, held: int, position: int) -> None:
    if held:
        await feed(stage, "a", 0, states(held))
    with pytest.raises(SessionLostError) as caught:
        await feed(stage, "a", position, states(1))
    assert (caught.value.session, caught.value.held) == ("a", held)
    expected = await feed(stage, "b", 0, states(held + 1))
    assert_same(await feed(stage, "a", held, states(held + 1)[held:]), expected[held:])


@pytest.mark.parametrize(("position", "length"), [(0, 513), (500, 13), (2**64 - 1, 1)])
async def test_more_than_the_context(stage: LocalStage, position: int, length: int) -> None:
    await feed(stage, "a", 0, states(500))
    with pytest.raises(CakeError, match=f"{position + length} tokens do not fit into the context of 512"):
        await feed(stage, "a", position, states(length))
    assert (await feed(stage, "a", 500, states(12))).shape == (12, 64)


async def test_a_cache_that_had_to_grow_keeps_what_it_held(stage: LocalStage) -> None:
    hidden = states(300)
    whole = await feed(stage, "whole", 0, hidden)
    await feed(stage, "grown", 0, hidden[:200])
    assert_same(await feed(stage, "grown", 200, hidden[200:]), whole[200:])


async def test_forget_frees(stage: LocalStage) -> None:
    await feed(stage, "a", 0, states(4))
    await feed(stage, "b", 0, states(5, seed=1))
    assert stage.n_sessions == 2
    await stage.forget(["a", "never heard of"])
    assert stage.n_sessions == 1
    with pytest.raises(SessionLostError) as caught:
        await feed(stage, "a", 4, states(1))
    assert caught.value.held == 0
    assert (await feed(stage, "b", 5, states(1))).shape == (1, 64)


async def test_a_batch_of_several_sessions_equals_each_alone(stage: LocalStage) -> None:
    await feed(stage, "decoding", 0, states(9, seed=1))
    await feed(stage, "alone", 0, states(9, seed=1))
    prompt, token, draft = states(5, seed=2), states(1, seed=3), states(3, seed=4)
    await feed(stage, "drafting", 0, states(12, seed=5))
    await feed(stage, "drafting alone", 0, states(12, seed=5))
    segments = (Segment("prompt", 0, 5), Segment("decoding", 9, 1), Segment("drafting", 7, 3))
    together = (await stage.forward(Batch(torch.cat([prompt, token, draft]), segments))).hidden
    assert_same(together[:5], await feed(stage, "prompt alone", 0, prompt))
    assert_same(together[5:6], await feed(stage, "alone", 9, token))
    assert_same(together[6:], await feed(stage, "drafting alone", 7, draft))
    following = Batch(states(2, seed=6), (Segment("drafting", 10, 1), Segment("prompt", 5, 1)))
    after = (await stage.forward(following)).hidden
    assert_same(after[:1], await feed(stage, "drafting alone", 10, states(2, seed=6)[:1]))
    assert_same(after[1:], await feed(stage, "prompt alone", 5, states(2, seed=6)[1:]))


async def test_forget_waits_for_the_forwards_before_it(stage: LocalStage) -> None:
    await asyncio.gather(feed(stage, "a", 0, states(50)), stage.forget(["a"]))
    assert stage.n_sessions == 0
    await asyncio.gather(stage.forget(["a"]), feed(stage, "a", 0, states(5)))
    assert stage.n_sessions == 1


async def test_the_result_has_the_dtype_of_the_batch(stage: LocalStage) -> None:
    hidden = states(3).to(torch.bfloat16)
    result = await feed(stage, "a", 0, hidden)
    assert result.dtype == torch.bfloat16
    exact = await feed(stage, "b", 0, hidden.float())
    assert exact.dtype == torch.float32
    assert torch.equal(result, exact.to(torch.bfloat16))


async def test_what_a_stage_tells_of_itself(stage: LocalStage) -> None:
    assert (stage.node, stage.blocks, stage.device, stage.dtype) == ("here", SPAN, "cpu", "float32")
    await feed(stage, "a", 0, states(5))
    _, compute_s, _ = await stage.forward(Batch(states(1), (Segment("a", 5, 1),)))
    assert (stage.stats.messages, stage.stats.tokens) == (2, 6)
    assert stage.stats.compute_s > compute_s > 0
    assert stage.stats.bytes_sent == stage.stats.bytes_received == 0


async def test_loading_tells_of_every_block(tiny_model: Path, thread: DeviceThread) -> None:
    checkpoint, told = Checkpoint(tiny_model), []
    stage = LocalStage("here", SPAN, checkpoint.config, 512, thread)
    await thread.run(stage.load, checkpoint, told.append)
    assert told == [1, 2, 3]


async def test_few_tokens_are_answered_at_once_when_few_were_quick_before(stage: LocalStage) -> None:
    sent = to_wire(states(4))
    assert not stage.is_quick(4), "how long that takes is not known"
    answered = await stage.answer(sent, (Segment("asked", 0, 4),), 0.0)
    assert stage.is_quick(16)
    assert not stage.is_quick(17)
    at_once = stage.answer_at_once(sent, (Segment("at once", 0, 4),), time.perf_counter())
    assert at_once.hidden == answered.hidden
    assert at_once.wait_s < at_once.started_s <= time.perf_counter()
    with pytest.raises(SessionLostError):
        stage.answer_at_once(sent, (Segment("at once", 5, 4),), 0.0)
    await feed(stage, "at once", 4, states(1))  # and goes on in the device's thread
    assert stage._caches["at once"].length == 5
