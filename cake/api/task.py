"""What a request asks for, and what came of it so far, in whatever dialect it came."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cake.model.sampling import SamplingParams
from cake.tool_calls import Call
from cake.tools import Offer


@dataclass(frozen=True)
class Asked:
    """What is asked of an answer. What is None is left to the model."""

    max_tokens: int | None = None
    stops: Sequence[str] = ()  # texts at which it ends
    n: int = 1  # answers
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    n_scored: int | None = None  # beside each token; none, if no log probabilities are wanted
    schema: Mapping[str, Any] | None = None  # of the JSON that it must be


class TokenScore(NamedTuple):
    """A token of the vocabulary, the bytes that it stands for, and its log probability."""

    token: bytes
    logprob: float


class ScoredToken(NamedTuple):
    """A token of an answer, and those that were likeliest in its place, best first."""

    chosen: TokenScore
    likeliest: tuple[TokenScore, ...]


@dataclass(frozen=True)
class Delta:
    """What a token added to an answer: text, calls of tools, and its own score where that is wanted."""

    text: str = ""
    calls: tuple[Call, ...] = ()
    scored: ScoredToken | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.calls or self.scored)


@dataclass
class Choice:
    """One of the answers to a request, so far."""

    n_tokens: int = 0
    finish_reason: str | None = None  # "stop", "length" or "tool_calls"
    stop: str | None = None  # the text that ended it, where one did
    first_s: float = 0.0  # when its first token came, on the clock of `time.perf_counter`
    last_s: float = 0.0  # and its last

    def add_token(self) -> None:
        """One more has come."""
        self.n_tokens += 1
        self.last_s = time.perf_counter()
        if self.n_tokens == 1:
            self.first_s = self.last_s


@dataclass
class Task:
    """A request that was understood, and what came of it so far."""

    prompt: list[int]
    sampling: SamplingParams
    stops: Sequence[str]
    max_tokens: int
    offer: Offer | None = None
    n: int = 1  # answers
    prompt_run: int = 0  # tokens of the prompt that no session held
    turn_s: float = 0.0  # when its turn had come, on the clock of `time.perf_counter`
    choices: list[Choice] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = [Choice() for _ in range(self.n)]

    @property
    def n_tokens(self) -> int:
        """Of all answers."""
        return sum(choice.n_tokens for choice in self.choices)

    @property
    def n_cached(self) -> int:
        """Tokens of the prompt that a session held."""
        return max(0, len(self.prompt) - self.prompt_run)

    def count(self, n_tokens: int) -> None:
        """So many tokens of the prompt were run; none yet when its turn has come."""
        self.turn_s = self.turn_s or time.perf_counter()
        self.prompt_run += n_tokens
