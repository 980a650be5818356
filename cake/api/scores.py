"""Log probabilities of an answer's tokens, as OpenAI's and Ollama's clients are told them."""

from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from cake.api.task import ScoredToken, TokenScore


class Likely(TypedDict):
    """A token and how likely it was."""

    token: Annotated[str, Field(description="As text; a part of a character is told by its bytes alone.")]
    logprob: Annotated[float, Field(description="The natural logarithm of its probability.")]
    bytes: list[int]


class Chosen(Likely):
    """A token of the answer."""

    top_logprobs: Annotated[list[Likely], Field(description="The likeliest in its place, best first.")]


def chosen(scored: ScoredToken) -> Chosen:
    """A token and those beside it."""
    return {**_likely(scored.chosen), "top_logprobs": [_likely(each) for each in scored.likeliest]}


def _likely(score: TokenScore) -> Likely:
    return {"token": readable(score.token), "logprob": score.logprob, "bytes": list(score.token)}


def readable(token: bytes) -> str:
    """A part of a character is no text: its bytes are told apart."""
    return token.decode(errors="replace")
