"""From logits to tokens, held against the formulas."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cake.errors import CakeError
from cake.model.sampling import DEFAULT_SEED, Sampler, SamplingParams

NOTHING_RECENT = [0]  # with repeat_penalty=1, what came before does not matter


def logits_of(*probabilities: float) -> Tensor:
    """Logits whose softmax is these probabilities."""
    return torch.tensor(probabilities).log()


def draw(n: int, logits: Tensor, **params: Any) -> Counter[int]:
    """How often each token was drawn."""
    sampler = Sampler(SamplingParams(**{"repeat_penalty": 1.0, **params}))
    return Counter(sampler.sample(logits, NOTHING_RECENT) for _ in range(n))


def random_logits(seed: int, n: int = 40) -> Tensor:
    return 2 * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def softmax(logits: Tensor) -> "np.ndarray[Any, np.dtype[np.float64]]":
    values = np.exp(logits.numpy().astype(np.float64) - float(logits.max()))
    return values / values.sum()


def nucleus(probabilities: "np.ndarray[Any, Any]", top_p: float) -> set[int]:
    """The fewest likeliest tokens whose probabilities reach `top_p`, one after another."""
    chosen: set[int] = set()
    total = 0.0
    for token in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if total >= top_p:
            break
        chosen.add(token)
        total += probabilities[token]
    return chosen


def test_temperature_0_takes_the_likeliest() -> None:
    for seed in range(5):
        logits = random_logits(seed)
        assert draw(3, logits, temperature=0) == {int(np.argmax(logits.numpy())): 3}


def test_temperature_0_ignores_the_filters() -> None:
    assert draw(1, logits_of(0.2, 0.5, 0.3), temperature=0, top_k=1, top_p=0.1) == {1: 1}


def test_top_k() -> None:
    logits = logits_of(0.1, 0.3, 0.25, 0.2, 0.15)
    assert draw(300, logits, top_k=1).keys() == {1}
    assert draw(300, logits, top_k=3).keys() == {1, 2, 3}
    for everything in (None, 0, 5, 99):
        assert draw(300, logits, top_k=everything).keys() == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_top_p_allows_the_nucleus_and_nothing_else(top_p: float, seed: int) -> None:
    logits = random_logits(seed, 12)
    allowed = nucleus(softmax(logits), top_p)
    # The rarest allowed token decides how many draws it takes for all to come up.
    rarest = min(softmax(logits)[sorted(allowed)])
    assert draw(int(8 / rarest), logits, top_p=top_p).keys() == allowed


def test_top_p_just_reached() -> None:
    logits = logits_of(0.5, 0.25, 0.125, 0.125)
    assert draw(200, logits, top_p=0.49).keys() == {0}
    assert draw(200, logits, top_p=0.51).keys() == {0, 1}
    assert draw(200, logits, top_p=0.76).keys() in ({0, 1, 2}, {0, 1, 3})


def test_top_p_counts_only_what_top_k_left() -> None:
    # Of all, 0.4 + 0.3 are 0.7; of the best two alone, 0.4 is 0.57 and reaches 0.55 by itself.
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    assert draw(200, logits, top_k=2, top_p=0.55).keys() == {0}
    assert draw(200, logits, top_p=0.55).keys() == {0, 1}


def test_top_p_comes_after_temperature() -> None:
    logits = logits_of(0.6, 0.3, 0.1)
    assert draw(200, logits, top_p=0.58).keys() == {0}
    assert draw(200, logits, top_p=0.58, temperature=3.0).keys() == {0, 1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_statistics(temperature: float) -> None:
    logits = logits_of(0.6, 0.3, 0.1)
    expected = np.array([0.6, 0.3, 0.1]) ** (1 / temperature)
    expected /= expected.sum()
    counts = draw(3000, logits, temperature=temperature)
    for token in range(3):
        deviation = (expected[token] * (1 - expected[token]) / 3000) ** 0.5
        assert abs(counts[token] / 3000 - expected[token]) < 4 * deviation


def test_the_same_seed_gives_the_same_tokens() -> None:
    logits = torch.zeros(1000)

    def tokens(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed, repeat_penalty=1.0))
        return [sampler.sample(logits, NOTHING_RECENT) for _ in range(20)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert len(set(tokens(7))) > 10
    assert SamplingParams().seed == DEFAULT_SEED == 299792458


def penalized(logits: list[float], ids: list[int], penalty: float, last_n: int) -> list[float]:
    """CTRL's formula, as written in its paper for positive and for negative scores."""
    recent = ids[len(ids) - last_n :] if last_n <= len(ids) else ids
    return [(x / penalty if x > 0 else x * penalty) if i in recent else x for i, x in enumerate(logits)]


@pytest.mark.parametrize(
    ("penalty", "last_n", "expected"),
    [
        (1.0, 128, 0),
        (2.0, 128, 2),  # 4/2, 3/2 and -1*2: token 2 with 2.5 leads
        (1.1, 128, 0),  # 4/1.1 still leads
        (2.0, 1, 0),  # only the last token, 1, is punished
        (2.0, 2, 0),
        (2.0, 3, 2),
        (2.0, 0, 0),
        (0.5, 128, 0),
    ],
)
def test_repeat_penalty(penalty: float, last_n: int, expected: int) -> None:
    logits, ids = [4.0, 3.0, 2.5, -1.0], [0, 3, 1]
    params = SamplingParams(temperature=0, repeat_penalty=penalty, repeat_last_n=last_n)
    assert Sampler(params).sample(torch.tensor(logits), ids) == expected
    assert int(np.argmax(penalized(logits, ids, penalty, last_n))) == expected


def test_repeat_penalty_punishes_each_token_once_and_negative_scores_too() -> None:
    params = SamplingParams(temperature=0, repeat_penalty=2.0)
    logits = torch.tensor([4.0, 1.5, -9.0])
    assert Sampler(params).sample(logits, [0, 0, 0]) == 0  # 2.0, not 0.5
    negative = torch.tensor([-1.0, -1.5, -9.0])
    assert Sampler(params).sample(negative, [0]) == 1  # -2.0 falls behind -1.5


def test_repeat_penalty_on_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, -1.0])
    expected = softmax(torch.tensor(penalized([2.0, 1.0, -1.0], [0, 2], 1.5, 128)))
    sampler = Sampler(SamplingParams(repeat_penalty=1.5))
    counts = Counter(sampler.sample(logits, [0, 2]) for _ in range(3000))
    for token in range(3):
        deviation = (expected[token] * (1 - expected[token]) / 3000) ** 0.5
        assert abs(counts[token] / 3000 - expected[token]) < 4 * deviation


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(0)
    before = logits.clone()
    Sampler(SamplingParams(repeat_penalty=2.0, top_k=3, top_p=0.5)).sample(logits, [1, 2, 3])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_output_that_is_not_finite(bad: float, temperature: float) -> None:
    logits = torch.tensor([1.0, bad, 2.0])
    with pytest.raises(CakeError, match="not finite; try a wider --dtype"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits, [0])


def test_no_token_before_the_first() -> None:
    assert Sampler(SamplingParams(temperature=0)).sample(torch.tensor([1.0, 2.0]), []) == 1


def test_what_the_answer_has_already_is_made_less_likely() -> None:
    """Once for being there, and for every time; what stands in the prompt alone is left as it is."""
    logits = torch.tensor([1.0, 0.92, 0.0])
    params = SamplingParams(temperature=0, repeat_penalty=1, presence_penalty=0.05, frequency_penalty=0.1)
    sampler = Sampler(params)
    assert [sampler.sample(logits, [0, 0, 0]) for _ in range(5)] == [0, 1, 0, 1, 0]
    assert sampler.twin().sample(logits, []) == sampler.sample(logits, [])


def test_scores_are_the_models_own_whatever_is_chosen() -> None:
    logits = random_logits(1)
    expected = np.log(softmax(logits))
    sampler = Sampler(SamplingParams(temperature=0, bias=((7, 100.0),), scored=3))
    assert sampler.sample(logits, []) == 7
    (scores,) = sampler.scores
    assert scores.chosen.token == 7
    assert scores.chosen.logprob == pytest.approx(expected[7], abs=1e-5)
    best = sorted(range(len(expected)), key=lambda i: -expected[i])[:3]
    assert [score.token for score in scores.likeliest] == best
    assert [score.logprob for score in scores.likeliest] == pytest.approx(expected[best], abs=1e-5)
