"""The pipeline: however the blocks are dealt out, the text is the same text one machine would write."""

import asyncio
import logging
import math
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import (
    GREEDY,
    IMPATIENT,
    PATIENT,
    NoText,
    cpu_thread,
    greedy_ids,
    pipeline_over,
    serving,
    spread,
    transformers_ids,
)

from cake.errors import CakeError, NodeError, PromptTooLongError, SessionLostError
from cake.generator import Generator
from cake.model.batch import Segment
from cake.pipeline import Pipeline, open_pipeline
from cake.scheduler import Scheduler
from cake.session import Session
from cake.topology import Node, Topology
from cake.weights.checkpoint import Checkpoint

PROMPT = [(7 * i * i + 3 * i + 1) % 256 for i in range(20)]
N = 32
# The spans of each worker; the stages that come of it, by node.
LAYOUTS: dict[str, tuple[list[list[range]], list[str]]] = {
    "no workers": ([], ["master"]),
    "one worker with all": ([[range(0, 6)]], ["w0"]),
    "three workers": ([[range(0, 2)], [range(2, 3)], [range(3, 6)]], ["w0", "w1", "w2"]),
    "master at start, middle and end": (
        [[range(1, 3)], [range(4, 5)]],
        ["master", "w0", "master", "w1", "master"],
    ),
    "a worker with two spans": ([[range(0, 2), range(4, 6)]], ["w0", "master", "w0"]),
    "workers out of order": ([[range(4, 6)], [range(0, 2), range(3, 4)]], ["w1", "master", "w1", "w0"]),
}


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[int]:
    """What transformers makes of the prompt."""
    return transformers_ids(tiny_model, PROMPT, N)


async def soon(awaitable):
    return await asyncio.wait_for(awaitable, 30)


def generator(pipeline: Pipeline, chunk: int = 512) -> Generator:
    return Generator(pipeline, NoText(), frozenset(), chunk)  # type: ignore[arg-type]


async def answer(pipeline: Pipeline, session: Session, prompt: Sequence[int], n: int) -> list[int]:
    """Greedy tokens; the session stays."""
    return [piece.token async for piece in generator(pipeline).generate(session, prompt, GREEDY, n)]


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize(("workers", "nodes"), LAYOUTS.values(), ids=LAYOUTS)
async def test_greedy_ids_are_those_of_transformers(
    tiny_model: Path, expected: list[int], workers: list[list[range]], nodes: list[str], chunk: int
) -> None:
    async with spread(tiny_model, workers) as pipeline:
        assert [stage.node for stage in pipeline.stages] == nodes
        assert [block for stage in pipeline.stages for block in stage.blocks] == list(range(6))
        assert await soon(greedy_ids(pipeline, PROMPT, N, chunk)) == expected
        for stage in pipeline.stages:  # one trip for each pass, whatever the number of blocks
            assert stage.stats.messages == math.ceil(len(PROMPT) / chunk) + N - 1
            assert stage.stats.tokens == len(PROMPT) + N - 1


@pytest.mark.parametrize(
    "workers", [[], LAYOUTS["master at start, middle and end"][0]], ids=["here", "spread"]
)
async def test_logits_are_those_of_transformers(tiny_model: Path, workers: list[list[range]]) -> None:
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        right = model(torch.tensor([PROMPT])).logits[0]
    async with spread(tiny_model, workers) as pipeline:
        logits = await soon(Scheduler(pipeline, chunk=7).run(Session(list(PROMPT)), torch.clone))
        assert logits.shape == (1, 256)
        assert torch.allclose(logits[0], right[-1], rtol=0, atol=1e-4)
        every = await pipeline.forward(PROMPT, [Segment(10**6, 0, len(PROMPT))])
        assert torch.allclose(await pipeline.choose(every, torch.clone), right, rtol=0, atol=1e-4)


async def test_sessions_of_one_batch_do_not_see_one_another(tiny_model: Path) -> None:
    async with spread(tiny_model, [[range(2, 5)]]) as pipeline:
        one, two = PROMPT[:12], PROMPT[12:]
        together = await soon(pipeline.forward(one + two, [Segment(1, 0, 12), Segment(2, 0, 8)]))
        alone = [
            await pipeline.forward(ids, [Segment(3 + i, 0, len(ids))]) for i, ids in enumerate((one, two))
        ]
    limit = 1e-5 * together.abs().max().item()
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=limit)


async def test_two_pipelines_at_once_on_one_worker(tiny_model: Path, expected: list[int]) -> None:
    other = list(reversed(PROMPT))
    alone = transformers_ids(tiny_model, other, N)
    assert alone != expected
    async with (
        serving(tiny_model, "w0", range(1, 5)) as node,
        pipeline_over(tiny_model, node) as one,
        pipeline_over(tiny_model, node) as two,
    ):
        both = await soon(asyncio.gather(greedy_ids(one, PROMPT, N), greedy_ids(two, other, N, chunk=3)))
    assert both == [expected, alone]


@pytest.mark.parametrize("forgetful", [0, 1, 2])
async def test_a_stage_that_forgets_in_mid_generation(
    tiny_model: Path, expected: list[int], forgetful: int
) -> None:
    async with spread(tiny_model, [[range(0, 2)], [range(4, 6)]]) as pipeline:
        assert [stage.node for stage in pipeline.stages] == ["w0", "master", "w1"]
        session, got = Session(), []
        async for piece in generator(pipeline).generate(session, PROMPT, GREEDY, N):
            got.append(piece.token)
            if len(got) == 5:
                await pipeline.stages[forgetful].forget([session.number])
        assert got == expected
        replayed = len(PROMPT) + 5  # and the stages before it ran one token more, in vain
        usual = len(PROMPT) + N - 1
        tokens = [stage.stats.tokens for stage in pipeline.stages]
        assert tokens == [usual + replayed - (0 if i < forgetful else 1) for i in range(3)]


async def test_a_session_that_is_lost_again_and_again_is_an_error(tiny_model: Path, monkeypatch) -> None:
    async def lose(batch: object) -> None:
        raise SessionLostError(0, 0)

    async with spread(tiny_model, []) as pipeline:
        monkeypatch.setattr(pipeline.stages[0], "forward", lose)
        with pytest.raises(SessionLostError):
            await soon(greedy_ids(pipeline, PROMPT, 1))


async def test_only_what_differs_is_run_again(tiny_model: Path, expected: list[int]) -> None:
    async with spread(tiny_model, [[range(2, 4)]]) as pipeline:
        session = Session()

        async def tokens_for(prompt: list[int], n: int, right: list[int]) -> int:
            before = [stage.stats.tokens for stage in pipeline.stages]
            assert await soon(answer(pipeline, session, prompt, n)) == right
            (ran,) = {stage.stats.tokens - b for stage, b in zip(pipeline.stages, before, strict=True)}
            return ran

        assert await tokens_for(PROMPT, 8, expected[:8]) == 20 + 7
        assert await tokens_for(PROMPT, 4, expected[:4]) == 1 + 3  # the last token, for its logits
        longer = PROMPT + expected[:3] + [200, 201]
        assert await tokens_for(longer, 2, transformers_ids(tiny_model, longer, 2)) == 2 + 1
        forked = [*PROMPT[:6], 99, *PROMPT[7:]]
        assert forked != PROMPT
        assert await tokens_for(forked, 2, transformers_ids(tiny_model, forked, 2)) == 14 + 1
        shorter = PROMPT[:4]
        assert await tokens_for(shorter, 2, transformers_ids(tiny_model, shorter, 2)) == 1 + 1
        assert session.ids == shorter + transformers_ids(tiny_model, shorter, 2)


async def test_an_answer_that_was_abandoned_does_not_spoil_the_next(
    tiny_model: Path, expected: list[int]
) -> None:
    async with spread(tiny_model, [[range(2, 4)]]) as pipeline:
        session = Session()
        begun = asyncio.Event()

        async def answer_for_long() -> None:
            async for _ in generator(pipeline).generate(session, PROMPT, GREEDY, 400):
                begun.set()

        answering = asyncio.create_task(answer_for_long())
        await soon(begun.wait())
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        assert answering.cancelled()
        assert await soon(answer(pipeline, session, PROMPT, N)) == expected


async def test_closing_a_session_frees_it_everywhere(tiny_model: Path) -> None:
    async with spread(tiny_model, [[range(2, 4)]]) as pipeline:
        session = Session()
        await soon(answer(pipeline, session, PROMPT, 2))
        await generator(pipeline).close_session(session)
        for stage in pipeline.stages:
            ids = [Segment(session.number, len(PROMPT), 1)]
            with pytest.raises(SessionLostError) as caught:
                await pipeline.forward([1], ids)
            assert caught.value.held == 0
            assert stage.stats.tokens == len(PROMPT) + 1


async def test_the_context_is_the_smallest_of_all(tiny_model: Path) -> None:
    async with spread(tiny_model, [[range(0, 6)]]) as pipeline:
        assert pipeline.context == 512
        assert pipeline.max_batch_tokens == 2048
        prompt = [1 + i % 200 for i in range(509)]
        assert len(await soon(greedy_ids(pipeline, prompt, 100))) == 3  # as many as the context has room for


@pytest.fixture
def unreachable() -> Iterator[Node]:
    """A node whose port is bound and refuses."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield Node("gone", *bound.getsockname(), (range(3, 6),))


async def test_one_node_that_cannot_be_reached_releases_the_others(
    tiny_model: Path, unreachable: Node, caplog: pytest.LogCaptureFixture
) -> None:
    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "left: the master is done" in record.getMessage():
                left.set()

    left, watch, logger = asyncio.Event(), Watch(), logging.getLogger("cake.visit")
    caplog.set_level(logging.INFO, "cake.visit")
    logger.addHandler(watch)
    try:
        async with serving(tiny_model, "here", range(0, 3)) as node:
            with pytest.raises(NodeError, match=r"worker 'gone' at .* cannot be reached"):
                async with pipeline_over(tiny_model, node, unreachable, patience=IMPATIENT):
                    raise AssertionError("this pipeline has a hole")
            await soon(left.wait())
            async with pipeline_over(tiny_model, node) as pipeline:
                assert len(await soon(greedy_ids(pipeline, PROMPT, 2))) == 2
    finally:
        logger.removeHandler(watch)


BAD_PROMPTS = {
    "empty": ([], CakeError, "the prompt is empty"),
    "as long as the context": ([1] * 512, PromptTooLongError, "has 512 tokens and the context holds 512"),
    "longer": ([1] * 600, PromptTooLongError, "has 600 tokens and the context holds 512"),
    "beyond the vocabulary": ([1, 256, 2], CakeError, "the token 256, but the model knows only 256"),
}


@pytest.mark.parametrize(("prompt", "error", "reason"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
async def test_a_prompt_that_cannot_be_answered(
    tiny_model: Path, prompt: list[int], error: type[CakeError], reason: str
) -> None:
    async with spread(tiny_model, [[range(0, 2)]]) as pipeline:
        with pytest.raises(error, match=reason):
            await soon(greedy_ids(pipeline, prompt, 4))
        assert [stage.stats.messages for stage in pipeline.stages] == [0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
async def test_what_travels_in_fewer_bits(tiny_model: Path, dtype: str) -> None:
    """As float32 nothing is lost; otherwise little is."""
    ids, segments = PROMPT * 3, [Segment(0, 0, 3 * len(PROMPT))]
    async with spread(tiny_model, []) as here:
        expected = await soon(here.forward(ids, segments))
    async with serving(tiny_model, "w0", range(0, 3)) as node:
        topology, thread = Topology({"w0": node}), cpu_thread()
        pipeline = await open_pipeline(
            Checkpoint(tiny_model), topology, thread, 512, PATIENT, wire_dtype=dtype
        )
        try:
            got = await soon(pipeline.forward(ids, segments))
        finally:
            await pipeline.close()
    assert torch.equal(got, expected) == (dtype == "float32")
    difference = torch.nn.functional.mse_loss(got, expected).sqrt() / expected.std()
    assert difference < {"float32": 1e-9, "bfloat16": 0.05, "float16": 0.005, "int8": 0.1}[dtype]
