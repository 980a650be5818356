"""From logits to the next token."""

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cake.errors import SetupError
from cake.model.grammar import Grammar

DEFAULT_SEED = 299792458


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. Temperature 0 takes the likeliest; none switches a filter off."""

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    repeat_penalty: float = 1.1
    repeat_last_n: int = 128
    seed: int = DEFAULT_SEED
    presence_penalty: float = 0.0  # taken off the logits of what the answer has already, once
    frequency_penalty: float = 0.0  # and as often as it has it
    bias: tuple[tuple[int, float], ...] = ()  # token ids, and what is added to their logits
    scored: int | None = None  # tell each token's log probability, and so many of the likeliest beside it
    grammar: Grammar | None = None  # what the answer must keep to


class Score(NamedTuple):
    """A token's log probability as the model gave it, before anything was filtered or made less likely."""

    token: int
    logprob: float


class Scores(NamedTuple):
    """Of the token that was chosen, and of the likeliest, best first."""

    chosen: Score
    likeliest: tuple[Score, ...]


class Sampler:
    """Chooses tokens for one answer; the same seed and logits give the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = torch.Generator().manual_seed(params.seed)
        self._place = params.grammar.begin() if params.grammar is not None else None
        self._made: Counter[int] = Counter()  # the answer's tokens, where they are to be made less likely
        self.scores: deque[Scores] = deque()  # of the tokens in their order, where they are wanted

    def sample(self, logits: Tensor, ids: Sequence[int]) -> int:
        """The next token after `ids`, from float32 logits `[vocab_size]` on the CPU.

        Where there is a grammar, each token is taken to be the answer's next one.
        """
        # A sum is seen through ten times as fast, and is finite unless one of them is not, or some are huge.
        if not math.isfinite(float(logits.sum())) and not torch.isfinite(logits).all():
            raise SetupError("the model's output is not finite; try a wider --dtype")
        allowed = logits if self._place is None else self._place.masked(logits)
        token = self._drawn(self._penalized(self._biased(allowed), ids))
        if self._place is not None:
            self._place.advance(token)
        if self._params.presence_penalty or self._params.frequency_penalty:
            self._made[token] += 1
        if self._params.scored is not None:
            self.scores.append(_scores(logits, token, self._params.scored))
        return token

    def verify(self, logits: Tensor, ids: Sequence[int], proposals: Sequence[int]) -> list[int]:
        """The next tokens after `ids`: as many of `proposals` as it chooses itself, and one more.

        `logits` `[len(proposals) + 1, vocab_size]`: row i is the model's for `ids + proposals[:i]`. Every
        token is drawn as `sample` would have drawn it, in the same order and with the same random numbers;
        a proposal decides only whether the row after it is of use. So text and odds are the same whatever
        is proposed. (Rejection sampling, Leviathan et al., arXiv:2211.17192, keeps the odds only; for
        proposals that are no draws it accepts as many, for a draft's draws a few more, see `twin`.)
        """
        seen = list(ids[-max(self._params.repeat_last_n, 1) :])
        chosen: list[int] = []
        for row, proposal in zip(logits, [*proposals, None], strict=True):
            chosen.append(self.sample(row, seen))
            if chosen[-1] != proposal:
                break
            seen.append(proposal)
        return chosen

    def twin(self) -> "Sampler":
        """One that will draw the same random numbers, to guess what this one will choose.

        Drawn with the same numbers, a draft's token is this sampler's more often than by chance: their
        distributions' distance d leaves at least (1 - d) / (1 + d) of agreement (Daliri, Musco and Suresh,
        arXiv:2408.07978), rejection sampling 1 - d.
        """
        other = Sampler(replace(self._params, scored=None))
        other._random.set_state(self._random.get_state())
        other._place = self._place.copy() if self._place is not None else None
        other._made = self._made.copy()
        return other

    def _drawn(self, logits: Tensor) -> int:
        if self._params.temperature == 0:
            return int(logits.argmax())
        # Without the largest, no temperature is too small to divide by.
        scaled = (logits - logits.max()) / self._params.temperature
        probabilities = self._filtered(scaled).softmax(dim=-1)
        # The winner of a race of exponential clocks is a fair draw, and torch.multinomial's way too. Two
        # distributions that are much alike mostly have the same winner when the clocks are the same.
        clocks = torch.empty_like(probabilities).exponential_(generator=self._random)
        return int((probabilities / clocks).argmax())

    def _biased(self, logits: Tensor) -> Tensor:
        """As the request's bias has it, and the answer's own tokens less likely (OpenAI's definition)."""
        params = self._params
        if not params.bias and not self._made:
            return logits
        logits = logits.clone()
        for token, bias in params.bias:
            logits[token] += bias
        for token, n in self._made.items():
            logits[token] -= params.presence_penalty + n * params.frequency_penalty
        return logits

    def _penalized(self, logits: Tensor, ids: Sequence[int]) -> Tensor:
        """Make the last tokens less likely (Keskar et al., CTRL, arXiv:1909.05858)."""
        penalty, last_n = self._params.repeat_penalty, self._params.repeat_last_n
        if penalty == 1 or last_n == 0:
            return logits
        recent = torch.tensor(sorted(set(ids[-last_n:])), dtype=torch.long)
        scores = logits[recent]
        logits = logits.clone()
        logits[recent] = torch.where(scores < 0, scores * penalty, scores / penalty)
        return logits

    def _filtered(self, logits: Tensor) -> Tensor:
        """Only the `top_k` likeliest stay, and of those the fewest that make up `top_p`."""
        top_k, top_p = self._params.top_k, self._params.top_p
        if top_k is not None and 0 < top_k < logits.shape[-1]:
            threshold = logits.topk(top_k).values[-1]
            logits = logits.masked_fill(logits < threshold, float("-inf"))
        if top_p is not None and top_p < 1:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            logits = logits.index_fill(0, order[before >= top_p], float("-inf"))
        return logits


def _scores(logits: Tensor, token: int, n: int) -> Scores:
    logprobs = logits.log_softmax(dim=-1)
    values, tokens = logprobs.topk(min(n, len(logprobs)))
    likeliest = zip(tokens.tolist(), values.tolist(), strict=True)
    return Scores(Score(token, float(logprobs[token])), tuple(Score(*each) for each in likeliest))
