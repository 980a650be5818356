"""Grammars that an answer keeps to: JSON, JSON of a schema, calls of tools.

`llguidance` says which tokens may come next; the sampler draws only among those. Knows nothing of the
model, and nothing of HTTP. The library is an extra, `cake[api]`, and imported when the first grammar is read.
"""

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cake.errors import GrammarError, SetupError
from cake.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Between two parts of JSON: nothing, a space, or a new line with its indentation. With any white space
# allowed, a small model that does not know how to go on may write spaces for ever.
OPTIONS = {"whitespace_pattern": r" |\n {0,32}"}


class Grammars:
    """Reads grammars for a model, of which it needs the tokenizer, and the tokens that end an answer."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        """Takes a second or two for a vocabulary of 128 thousand tokens."""
        if not stop_ids:
            raise GrammarError("the model has no end token, so no answer of it can be made to end in time")
        library = _library()
        try:
            self._tokens = library.LLTokenizer(tokenizer.serialized, eos_token=sorted(stop_ids))
        except ValueError as error:
            raise GrammarError(f"the model's tokenizer cannot be held to a grammar: {error}") from error

    def json_object(self) -> "Grammar":
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any]) -> "Grammar":
        """JSON that the schema allows. Raises `GrammarError` where no text can be held to it."""
        text = _json_text(schema)
        try:
            return Grammar(self._tokens, _library().LLMatcher.grammar_from_json_schema(text))
        except ValueError as error:
            raise GrammarError(f"the schema cannot be read: {error}") from error

    def lark(self, text: str) -> "Grammar":
        """A grammar in llguidance's dialect of Lark. Raises `GrammarError` where it is none."""
        return Grammar(self._tokens, _library().LLMatcher.grammar_from_lark(text))


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON of a schema, as a part of a rule in `Grammars.lark`."""
    return f"%json {_json_text(schema)}"


class Grammar:
    """What an answer may be. Holds nothing of an answer, so any number of them may keep to it."""

    def __init__(self, tokens: Any, text: str) -> None:
        library = _library()
        limits = library.LLParserLimits(verbose_errors=False)
        self._start = library.LLMatcher(tokens, text, log_level=0, limits=limits)
        self._size = tokens.vocab_size
        _check(self._start, "no text can be held to this")
        self.begin().allowed()  # where that is too much for the library, better now than in an answer

    def begin(self) -> "Place":
        """Where an answer begins."""
        return Place(self._start.deep_copy(), self._size)


class Place:
    """How far in its grammar an answer is."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def copy(self) -> "Place":
        """The same place, for another that goes on from here."""
        return Place(self._matcher.deep_copy(), self._size)

    def allowed(self) -> "NDArray[np.uint8]":
        """For each token, 1 if it may come next and 0 if not."""
        bits = np.zeros((self._size + 31) // 32, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        _check(self._matcher, "no text can be held to this any further")
        return np.unpackbits(bits.view(np.uint8), count=self._size, bitorder="little")

    def masked(self, logits: Tensor) -> Tensor:
        """`logits` `[vocab_size]`, minus infinity where the token may not come next.

        A token that ends the answer may come where the grammar is complete, and only there.
        """
        allowed = np.zeros(len(logits), dtype=np.uint8)  # a model's head may have rows without a token
        known = self.allowed()[: len(logits)]
        allowed[: len(known)] = known
        return logits.masked_fill(torch.from_numpy(allowed) == 0, float("-inf"))

    def advance(self, token: int) -> None:
        """The token, one of those that `masked` leaves, was chosen. Behind the end all is the same."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        _check(self._matcher, "no text can be held to this any further")


def _check(matcher: Any, what: str) -> None:
    """The library does not raise what is wrong with a grammar, or too much for it."""
    if matcher.is_error():
        reason = " ".join(matcher.get_error().split())[:300]
        raise GrammarError(f"{what}: {reason}")


def _json_text(schema: Mapping[str, Any]) -> str:
    """The schema and our options, as JSON itself; Python would write infinity too, which is none."""
    try:
        text = json.dumps({**schema, "x-guidance": OPTIONS}, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is no JSON: {error}") from error
    return text


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise SetupError("grammars need llguidance; run pip install 'cake[api]'") from error
    return llguidance
