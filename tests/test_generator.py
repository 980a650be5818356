"""The generator with somebody who proposes: good or bad, the tokens are the same."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import GREEDY, NoText, spread, transformers_ids

from cake.chunks import SMALLEST_CHUNK
from cake.draft import DraftModel
from cake.generator import Generator, Piece
from cake.model.grammar import Grammars
from cake.model.sampling import Sampler, SamplingParams
from cake.pipeline import Pipeline
from cake.session import Session
from cake.speculation import NGrams, Pace, Proposer

PROMPTS = [
    [(7 * i * i + 3 * i + 1) % 256 for i in range(20)],
    [5, 6, 7, 8] * 10,
    [(i * i) % 251 for i in range(150)],
]
N = 40
SAMPLED = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, repeat_last_n=8)
SPREAD = [[range(0, 2)], [range(4, 6)]]


class Scripted(NGrams):
    """Proposes what a script says; `rubbish` is wrong from that proposal of each round on."""

    def __init__(self, script: Sequence[int] = (), rubbish: int | None = None) -> None:
        super().__init__()
        self.script, self.rubbish = list(script), rubbish

    async def propose(self, ids: Sequence[int], assumed: int, most: int, sampler: Sampler) -> list[int]:
        """What the script says after `ids`, and wrong tokens behind it."""
        proposals = self.script[len(ids) :][:most]
        proposals += [1] * (most - len(proposals))
        wrong = len(proposals) if self.rubbish is None else self.rubbish
        return proposals[:wrong] + [(token + 1) % 256 for token in proposals[wrong:]]


@pytest.fixture(params=[1, 4], ids=["alone", "four at once"])
def eager(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """As many proposals as there may be, whatever becomes of them; in so many passes at once."""
    monkeypatch.setattr(Pace, "best", lambda pace: pace._most)
    monkeypatch.setattr(Pace, "passes", lambda pace, n, network_s: request.param)
    return int(request.param)


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[list[int]]:
    """What transformers makes of each prompt."""
    return [transformers_ids(tiny_model, prompt, N) for prompt in PROMPTS]


def generator(
    pipeline: Pipeline,
    new_proposer: Callable[[], Proposer] | None,
    chunk: int | None = None,
    stop: frozenset[int] = frozenset(),
) -> Generator:
    return Generator(pipeline, NoText(), stop, chunk, new_proposer)  # type: ignore[arg-type]


async def pieces(
    generator: Generator,
    prompt: Sequence[int],
    sampling: SamplingParams = GREEDY,
    n: int = N,
    session: Session | None = None,
) -> list[Piece]:
    """A whole answer."""
    session = session or Session()
    answer = generator.generate(session, prompt, sampling, n)
    return [piece async for piece in answer]


def all_right(passes: int) -> int:
    """Accepted tokens of three passes: 15 + 1, 15 + 1, 6 + 1 behind the first token.

    The one behind the proposals was a guess too if another pass has built on it.
    """
    return N - 1 - (3 if passes == 1 else 1)


def tokens(answer: Sequence[Piece]) -> list[int]:
    return [piece.token for piece in answer]


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("workers", [[], SPREAD], ids=["here", "spread"])
@pytest.mark.parametrize("rubbish", [None, 0, 1, 4])
async def test_tokens_are_the_same_whatever_is_proposed(
    tiny_model: Path,
    expected: list[list[int]],
    eager: int,
    workers: list[list[range]],
    rubbish: int | None,
    chunk: int | None,
) -> None:
    async with spread(tiny_model, workers) as pipeline:
        for prompt, right in zip(PROMPTS, expected, strict=True):
            made = generator(pipeline, lambda p=prompt, r=right: Scripted(p + r, rubbish), chunk)
            before = pipeline.stages[0].stats.messages
            answer = await pieces(made, prompt)
            assert tokens(answer) == right
            assert answer[-1].finish_reason == "length"
            accepted = sum(piece.accepted for piece in answer)
            if chunk is None and eager == 1:  # the prompt's pass made the first token
                passes = pipeline.stages[0].stats.messages - before
                assert passes == N - accepted or len(prompt) > SMALLEST_CHUNK
            expected_share = {None: 1.0, 0: 0.0}.get(rubbish)
            if expected_share is not None:
                assert accepted == expected_share * sum(piece.proposed for piece in answer)
            if rubbish is None:
                assert accepted == all_right(eager)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_ngrams_change_nothing_but_the_number_of_passes(
    tiny_model: Path, sampling: SamplingParams
) -> None:
    async with spread(tiny_model, [[range(0, 3)]]) as pipeline:
        for prompt in PROMPTS:
            plain = await pieces(generator(pipeline, None), prompt, sampling)
            assert sum(piece.proposed for piece in plain) == 0
            guessed = await pieces(generator(pipeline, NGrams), prompt, sampling)
            assert tokens(guessed) == tokens(plain)
            assert [p.text for p in guessed] == [p.text for p in plain]


@pytest.mark.parametrize("rubbish", [None, 0, 1, 9])
async def test_random_numbers_are_drawn_as_without_proposals(
    tiny_model: Path, eager: int, rubbish: int | None
) -> None:
    async with spread(tiny_model, SPREAD) as pipeline:
        for prompt in PROMPTS:
            plain = tokens(await pieces(generator(pipeline, None), prompt, SAMPLED))
            script = prompt + plain
            script[len(prompt) + 7] += 1  # and in between one that is wrong
            made = generator(pipeline, lambda s=script: Scripted(s, rubbish))
            assert tokens(await pieces(made, prompt, SAMPLED)) == plain


@pytest.mark.parametrize("forgetful", [0, 1, 2])
async def test_a_stage_that_forgets_between_proposals(
    tiny_model: Path, expected: list[list[int]], eager: int, forgetful: int
) -> None:
    async with spread(tiny_model, SPREAD) as pipeline:
        made = generator(pipeline, lambda: Scripted(PROMPTS[0] + expected[0], rubbish=3), chunk=4)
        session, got = Session(), []
        async for piece in made.generate(session, PROMPTS[0], GREEDY, N):
            got.append(piece.token)
            if len(got) in (5, 9, 13, 14):
                await pipeline.stages[forgetful].forget([session.number])
        assert got == expected[0]


async def test_an_answer_is_over_when_its_session_is_given_back(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the reader leaves early: others may go on with the session at once."""
    seen: list[str] = []
    async with spread(tiny_model, SPREAD) as pipeline:
        made = generator(pipeline, None)
        generate, make_room = made.generate, made.sessions._make_room

        async def generating(*arguments: Any) -> AsyncGenerator[Piece, None]:
            try:
                async for piece in generate(*arguments):
                    yield piece
            finally:
                seen.append("answer over")

        async def made_room() -> None:
            seen.append("session given back")
            await make_room()

        monkeypatch.setattr(made, "generate", generating)
        monkeypatch.setattr(made.sessions, "_make_room", made_room)
        answer = made.answer(PROMPTS[0], GREEDY, N)
        await anext(answer)
        await answer.aclose()
    assert seen == ["answer over", "session given back"]


async def test_what_a_session_holds_is_what_was_given_out(
    tiny_model: Path, expected: list[list[int]], eager: int
) -> None:
    script = PROMPTS[0] + expected[0]
    async with spread(tiny_model, SPREAD) as pipeline:
        for leave_after in (1, 2, 9, 17, 18):
            made = generator(pipeline, lambda: Scripted(script))
            session = Session()
            answer = made.generate(session, PROMPTS[0], GREEDY, N)
            for _ in range(leave_after):
                await answer.__anext__()
                if leave_after > 2:  # whoever reads slowly finds other passes come back
                    await asyncio.gather(*made._scheduler._tasks)
                assert session.held <= len(session.ids)
            assert session.ids == script[: len(PROMPTS[0]) + leave_after]
            assert session.held <= len(session.ids)
            await answer.aclose()
            longer = [*session.ids, 200, 201]
            right = transformers_ids(tiny_model, longer, 5)
            assert tokens(await pieces(made, longer, n=5, session=session)) == right


async def test_an_answer_cancelled_in_mid_verification_leaves_no_proposals(
    tiny_model: Path, expected: list[list[int]], eager: int
) -> None:
    async with spread(tiny_model, SPREAD) as pipeline:
        made = generator(pipeline, lambda: Scripted(rubbish=0))
        for moment in range(1, 12, 2):
            session, begun = Session(), asyncio.Event()

            async def answer(session: Session = session, begun: asyncio.Event = begun) -> None:
                async for _ in made.generate(session, PROMPTS[0], GREEDY, 400):
                    begun.set()

            answering = asyncio.create_task(answer())
            await begun.wait()
            for _ in range(moment):
                await asyncio.sleep(0)
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            given = session.ids[len(PROMPTS[0]) :]
            assert given == expected[0][: len(given)]
            assert session.held <= len(session.ids)
            assert tokens(await pieces(made, PROMPTS[0], session=session)) == expected[0]


@pytest.mark.parametrize("rubbish", [None, 2])
async def test_an_end_token_among_the_accepted_ends_the_answer(
    tiny_model: Path, expected: list[list[int]], eager: int, rubbish: int | None
) -> None:
    script = PROMPTS[0] + expected[0]
    place = next(i for i in range(4, N) if expected[0].index(expected[0][i]) == i)
    stop = frozenset([expected[0][place]])
    async with spread(tiny_model, []) as pipeline:
        made = generator(pipeline, lambda: Scripted(script, rubbish), stop=stop)
        session = Session()
        answer = await pieces(made, PROMPTS[0], session=session)
        assert tokens(answer) == expected[0][: place + 1]
        assert answer[-1].finish_reason == "stop"
        assert session.ids == PROMPTS[0] + expected[0][: place + 1]
        assert session.held <= len(session.ids)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 18])
async def test_never_more_tokens_than_asked_for(
    tiny_model: Path, expected: list[list[int]], eager: int, n: int
) -> None:
    async with spread(tiny_model, []) as pipeline:
        made = generator(pipeline, lambda: Scripted(PROMPTS[0] + expected[0]))
        answer = await pieces(made, PROMPTS[0], n=n)
        assert tokens(answer) == expected[0][:n]
        assert answer[-1].finish_reason == "length"


async def test_never_more_tokens_than_the_context_holds(tiny_model: Path, eager: int) -> None:
    prompt = [1 + i % 200 for i in range(495)]
    async with spread(tiny_model, [[range(0, 6)]]) as pipeline:
        plain = await pieces(generator(pipeline, None), prompt, n=100)
        assert len(plain) == 512 - 495
        made = generator(pipeline, lambda: Scripted(prompt + tokens(plain)))
        assert tokens(await pieces(made, prompt, n=100)) == tokens(plain)


async def test_many_sessions_verify_in_the_same_batches(
    tiny_model: Path, expected: list[list[int]], eager: int
) -> None:
    async with spread(tiny_model, SPREAD) as pipeline:
        scripts = iter([p + r for p, r in zip(PROMPTS, expected, strict=True)] * 2)
        made = generator(pipeline, lambda: Scripted(next(scripts), rubbish=3), chunk=9)
        answers = await asyncio.gather(*(pieces(made, prompt) for prompt in PROMPTS * 2))
        assert [tokens(answer) for answer in answers] == expected * 2


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_draft_of_the_same_model_is_always_right(
    tiny_model: Path, eager: int, sampling: SamplingParams
) -> None:
    async with spread(tiny_model, SPREAD) as pipeline, spread(tiny_model, []) as draft:
        model = DraftModel(draft)
        made, session = generator(pipeline, model.proposer), Session()
        for prompt in (*PROMPTS, PROMPTS[0][:10], PROMPTS[0]):
            plain = await pieces(generator(pipeline, None), prompt, sampling)
            answer = await pieces(made, prompt, sampling, session=session)
            assert tokens(answer) == tokens(plain)
            assert sum(piece.accepted for piece in answer) == all_right(eager)
        before = draft.stages[0].stats.tokens
        longer = [*session.ids, 9]
        await pieces(made, longer, sampling, n=4, session=session)
        ran = draft.stages[0].stats.tokens - before
        assert ran < 10, "what the draft holds it does not run again"
        await made.close_session(session)
        assert draft.stages[0].n_sessions == 0


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_draft_that_is_sometimes_right_changes_no_token(
    tiny_model: Path, tmp_path: Path, eager: int, sampling: SamplingParams
) -> None:
    async with spread(tiny_model, SPREAD) as pipeline, spread(slightly_other(tiny_model, tmp_path), []) as d:
        made = generator(pipeline, DraftModel(d).proposer)
        right = proposed = 0
        for prompt in PROMPTS:
            plain = await pieces(generator(pipeline, None), prompt, sampling)
            answer = await pieces(made, prompt, sampling)
            assert tokens(answer) == tokens(plain)
            right += sum(piece.accepted for piece in answer)
            proposed += sum(piece.proposed for piece in answer)
        assert 0 < right < proposed


class Bytes:
    """A tokenizer as grammars want it: every token is a byte, but for the first one, which ends an answer."""

    def __init__(self) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:255]
        model = models.BPE({"<end>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}, [])
        whole = Tokenizer(model)
        whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        whole.decoder = decoders.ByteLevel()
        whole.add_special_tokens([AddedToken("<end>", special=True)])
        self.serialized, self.decode = whole.to_str(), whole.decode


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_grammar_is_kept_to_whatever_is_proposed_and_lost(
    tiny_model: Path, tmp_path: Path, eager: int, sampling: SamplingParams
) -> None:
    tokens_of = Bytes()
    grammar = Grammars(tokens_of, {0}).lark(r"start: /([a-e]{2,4}[0-9]{3};){6}/")  # type: ignore[arg-type]
    sampling = replace(sampling, grammar=grammar)
    async with spread(tiny_model, SPREAD) as pipeline, spread(slightly_other(tiny_model, tmp_path), []) as d:
        for prompt in PROMPTS:
            plain = tokens(await pieces(generator(pipeline, None, stop=frozenset({0})), prompt, sampling, 60))
            assert re.fullmatch(r"([a-e]{2,4}\d{3};){6}", tokens_of.decode(plain)), tokens_of.decode(plain)
            for proposer in (
                DraftModel(d).proposer,
                NGrams,
                lambda ids=prompt + plain: Scripted(ids, rubbish=3),
            ):
                made, session, got = generator(pipeline, proposer, stop=frozenset({0})), Session(), []
                async for piece in made.generate(session, prompt, sampling, 60):
                    got.append(piece.token)
                    if len(got) in (5, 9, 13, 14):
                        await pipeline.stages[0].forget([session.number])
                assert got == plain


def slightly_other(folder: Path, to: Path) -> Path:
    """The same model, with some noise in its weights."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(to)
    return to


async def test_a_draft_with_a_shorter_context_stops_where_it_ends(tiny_model: Path, eager: int) -> None:
    async with spread(tiny_model, []) as pipeline, spread(tiny_model, []) as draft:
        draft.context = 30
        made = generator(pipeline, DraftModel(draft).proposer)
        for prompt in PROMPTS:
            plain = await pieces(generator(pipeline, None), prompt)
            assert tokens(await pieces(made, prompt)) == tokens(plain)
        assert all(cache.length <= 30 for cache in draft.stages[0]._caches.values())
