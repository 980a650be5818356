"""Answers drawn from random odds under a grammar, without a model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cake.model.grammar import Grammar
from cake.model.sampling import Sampler, SamplingParams
from cake.model.tokenizer import Tokenizer

STOP = 2  # the demo model's end token
Odds = Callable[[int], Tensor]


def json_odds(tokenizer: Tokenizer) -> Odds:
    """Random logits, by a seed, that like the tokens with which JSON comes to an end."""
    bonus = torch.zeros(len(tokenizer.vocabulary))
    for token, i in tokenizer.vocabulary.items():
        if set(token) & set('"]},'):
            bonus[i] = 6.0
    bonus[STOP] = 6.0
    return lambda seed: bonus + torch.randn(len(bonus), generator=torch.Generator().manual_seed(seed))


def draw(grammar: Grammar, odds: Odds, seed: int, begun: Sequence[int] = (), most: int = 600) -> list[int]:
    """Draw up to the end token, each token from other odds; the first are those of `begun`."""
    sampler = Sampler(SamplingParams(grammar=grammar, seed=seed, repeat_penalty=1.0))
    ids: list[int] = []
    while STOP not in ids:
        assert len(ids) < most, "it does not end"
        logits = odds(1000 * seed + len(ids))
        if len(ids) < len(begun):
            logits[begun[len(ids)]] += 1000
        ids.append(sampler.sample(logits, ids))
    assert ids[: len(begun)] == list(begun)
    return ids
