"""Several tokens checked at once: the same tokens as one by one, and exactly the model's odds."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cake.model.sampling import Sampler, SamplingParams

VOCABULARY = 5
MODEL = 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))
DRAFT = 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(4))
N = 1500
PROMPT = [2, 0, 3]
PARAMS: dict[str, dict[str, Any]] = {
    "plain": {"repeat_penalty": 1.0},
    "all filters": {
        "temperature": 1.2,
        "top_k": 4,
        "top_p": 0.9,
        "repeat_penalty": 1.5,
        "repeat_last_n": 2,
    },
}
Proposal = Callable[[Sampler, list[int]], int]


def logits_after(token: int, model: Tensor = MODEL) -> Tensor:
    """A model that looks at the last token only."""
    return model[token]


def drawn_from(model: Tensor) -> Proposal:
    """A draft's own draws, with the sampler's numbers."""
    return lambda sampler, ids: sampler.twin().sample(logits_after(ids[-1], model), ids)


def independent(model: Tensor) -> Proposal:
    """A draft's own draws, with numbers of its own."""
    numbers = Sampler(SamplingParams(repeat_penalty=1.0, seed=99))
    return lambda sampler, ids: numbers.sample(logits_after(ids[-1], model), ids)


PROPOSALS: dict[str, Callable[[], Proposal]] = {
    "the likeliest": lambda: lambda sampler, ids: int(logits_after(ids[-1]).argmax()),
    "the least likely": lambda: lambda sampler, ids: int(logits_after(ids[-1]).argmin()),
    "always the same": lambda: lambda sampler, ids: 1,
    "drawn by the model itself": lambda: drawn_from(MODEL),
    "drawn by another model": lambda: drawn_from(DRAFT),
    "drawn by the model's opposite": lambda: drawn_from(-3 * MODEL),
    "drawn by another model with other numbers": lambda: independent(DRAFT),
}


def exact(logits: Tensor, ids: Sequence[int], params: SamplingParams) -> "np.ndarray[Any, Any]":
    """The odds of each next token, by the definitions."""
    scores = logits.numpy().astype(np.float64).copy()
    for token in set(ids[-params.repeat_last_n :]):
        penalty = params.repeat_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    odds = np.exp(scores / params.temperature)
    order = np.argsort(-odds)
    kept = order[: params.top_k]
    shares = odds[kept] / odds[kept].sum()
    kept = kept[np.cumsum(shares) - shares < (params.top_p or 2)]
    result = np.zeros(VOCABULARY)
    result[kept] = odds[kept] / odds[kept].sum()
    return result


def chi_square(counts: Counter[Any], odds: dict[Any, float]) -> float:
    """How far the counts are from the odds, in deviations (Wilson and Hilferty's cube root)."""
    assert counts.keys() <= {outcome for outcome, p in odds.items() if p > 0}
    n = sum(counts.values())
    statistic = sum((counts[outcome] - n * p) ** 2 / (n * p) for outcome, p in odds.items() if p > 0)
    df = sum(p > 0 for p in odds.values()) - 1
    spread = 2 / (9 * df)
    return float(((statistic / df) ** (1 / 3) - (1 - spread)) / spread**0.5)


def two_tokens(sampler: Sampler, propose: Proposal) -> tuple[int, int]:
    """The two tokens after the prompt, of which the first is proposed."""
    proposal = propose(sampler, PROMPT)
    rows = torch.stack([logits_after(PROMPT[-1]), logits_after(proposal)])
    tokens = sampler.verify(rows, PROMPT, [proposal])
    if len(tokens) == 1:
        tokens += sampler.verify(logits_after(tokens[0])[None], PROMPT + tokens, [])
    return tokens[0], tokens[1]


@pytest.mark.parametrize("propose", PROPOSALS.values(), ids=PROPOSALS)
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_odds_are_the_models_whatever_is_proposed(
    params: dict[str, Any], propose: Callable[[], Proposal]
) -> None:
    chosen = SamplingParams(**params)
    sampler = Sampler(chosen)
    proposer = propose()
    pairs = Counter(two_tokens(sampler, proposer) for _ in range(N))
    first = exact(logits_after(PROMPT[-1]), PROMPT, chosen)
    second = [exact(logits_after(a), [*PROMPT, a], chosen) for a in range(VOCABULARY)]
    of_pairs = {(a, b): float(first[a] * second[a][b]) for a in range(VOCABULARY) for b in range(VOCABULARY)}
    assert chi_square(Counter(a for a, _ in pairs.elements()), dict(enumerate(first))) < 4
    assert chi_square(pairs, of_pairs) < 4


def test_one_who_believed_its_draft_would_be_found_out() -> None:
    params = SamplingParams(repeat_penalty=1.0)
    believe = independent(MODEL + 0.3 * DRAFT)
    believed = Counter(believe(Sampler(params), PROMPT) for _ in range(N))
    assert chi_square(believed, dict(enumerate(exact(logits_after(PROMPT[-1]), PROMPT, params)))) > 4


@pytest.mark.parametrize("n_right", range(4))
@pytest.mark.parametrize(
    "params", [*PARAMS.values(), {"temperature": 0.0}], ids=[*PARAMS, "greedy, recent tokens punished"]
)
def test_tokens_are_those_of_one_by_one(params: dict[str, Any], n_right: int) -> None:
    chosen = SamplingParams(**params)
    for seed in range(20):
        alone = Sampler(SamplingParams(**{**params, "seed": seed}))
        truth: list[int] = []
        for _ in range(4):
            truth.append(alone.sample(logits_after(([*PROMPT, *truth])[-1]), PROMPT + truth))
        proposals = truth[:3]
        if n_right < 3:
            proposals[n_right] = (proposals[n_right] + 1) % VOCABULARY
        rows = torch.stack([logits_after(token) for token in [PROMPT[-1], *proposals]])
        sampler = Sampler(SamplingParams(**{**params, "seed": seed}))
        assert sampler.verify(rows, PROMPT, proposals) == truth[: n_right + 1]
        # What comes next is drawn with the next number, not with one that a rejected token used up.
        ids = PROMPT + truth[: n_right + 1]
        assert sampler.sample(MODEL[0], ids) == again(chosen, seed, truth[: n_right + 1])


def again(params: SamplingParams, seed: int, tokens: list[int]) -> int:
    """The token after `tokens` where these were drawn one by one."""
    sampler = Sampler(SamplingParams(**{**vars(params), "seed": seed}))
    ids = list(PROMPT)
    for _ in tokens:
        ids.append(sampler.sample(logits_after(ids[-1]), ids))
    return sampler.sample(MODEL[0], ids)


def overlap(p: "np.ndarray[Any, Any]", q: "np.ndarray[Any, Any]") -> float:
    """1 - d: the most that any way of accepting a draft's draws can reach."""
    return float(np.minimum(p, q).sum())


def test_a_draft_that_draws_the_same_numbers_is_right_nearly_as_often_as_can_be() -> None:
    params = SamplingParams(repeat_penalty=1.0)
    p, q = (exact(logits_after(PROMPT[-1], model), PROMPT, params) for model in (MODEL, MODEL + DRAFT / 2))
    sampler, right = Sampler(params), 0
    for _ in range(N):
        guess = drawn_from(MODEL + DRAFT / 2)(sampler, PROMPT)
        right += sampler.sample(logits_after(PROMPT[-1]), PROMPT) == guess
    best = overlap(p, q)
    assert best / (2 - best) - 0.02 < right / N < best + 0.02
    assert right / N > 0.9 * best


def test_twins_agree_wherever_their_distributions_do() -> None:
    sampler = Sampler(SamplingParams(repeat_penalty=1.0))
    for _ in range(50):
        guess = sampler.twin().sample(MODEL[1], PROMPT)
        assert sampler.verify(MODEL[[1, guess]], PROMPT, [guess])[0] == guess
