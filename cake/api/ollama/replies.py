"""Answers and errors in Ollama's shapes: one object, or a line of JSON for each piece."""

import json
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from typing_extensions import TypedDict

from cake.api.errors import ApiError
from cake.api.handlers import LINES
from cake.api.task import Delta, ScoredToken, Task, TokenScore
from cake.tool_calls import Call


class OllamaError(TypedDict):
    """Every answer of another status than 200."""

    error: str


class Reply:
    """An answer that is timed from here on."""

    media_type = LINES

    def __init__(self, model: str) -> None:
        """`model` is what the client calls it."""
        self._model, self._began_s = model, time.perf_counter()

    @property
    def loaded(self) -> dict[str, Any]:
        """To a request without a prompt: the model is there."""
        return {**self._said("", ()), "done": True, "done_reason": "load"}

    def whole(self, task: Task, answers: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """The answer as one object."""
        (parts,) = answers
        calls = [call for part in parts for call in part.calls]
        said = self._said("".join(part.text for part in parts), calls)
        return {**said, **_logprobs(parts), **self._done(task)}

    def begin(self, task: Task) -> str:
        """Nothing is said before there is something to say."""
        return ""

    def part(self, number: int, part: Delta) -> str:
        """A piece of the answer."""
        return _line({**self._said(part.text, part.calls), "done": False, **_logprobs([part])})

    def end(self, task: Task) -> str:
        """Why it ended, and how long it took."""
        return _line({**self._said("", ()), **self._done(task)})

    def failed(self, error: ApiError) -> str:
        """An error amid the answer."""
        return _line(error_body(error))

    @abstractmethod
    def _content(self, text: str, calls: Iterable[Call]) -> dict[str, Any]:
        """Where the text stands."""

    def _said(self, text: str, calls: Iterable[Call]) -> dict[str, Any]:
        return {"model": self._model, "created_at": now(), **self._content(text, calls)}

    def _done(self, task: Task) -> dict[str, Any]:
        """Durations are nanoseconds. The model is loaded already: in its place stands the wait for a turn."""
        (choice,) = task.choices
        return {
            "done": True,
            "done_reason": "length" if choice.finish_reason == "length" else "stop",
            "total_duration": _ns(self._began_s, time.perf_counter()),
            "load_duration": _ns(self._began_s, task.turn_s),
            "prompt_eval_count": len(task.prompt),
            "prompt_eval_duration": _ns(task.turn_s, choice.first_s),
            "eval_count": choice.n_tokens,
            "eval_duration": _ns(choice.first_s, choice.last_s),
        }


class ChatReply(Reply):
    """To a chat."""

    def _content(self, text: str, calls: Iterable[Call]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        told = [_call(call) for call in calls]
        return {"message": {**message, **({"tool_calls": told} if told else {})}}


class TextReply(Reply):
    """To a single prompt."""

    def _content(self, text: str, calls: Iterable[Call]) -> dict[str, Any]:
        return {"response": text}


def error_body(error: ApiError) -> OllamaError:
    """The JSON object that tells of an error."""
    return {"error": str(error)}


def now() -> str:
    """The time in UTC, as RFC 3339 writes it."""
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def _line(said: Mapping[str, Any]) -> str:
    return json.dumps(said, ensure_ascii=False) + "\n"


def _ns(start_s: float, end_s: float) -> int:
    return round(1e9 * (end_s - start_s))


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "function": {"name": call.name, "arguments": json.loads(call.arguments)}}


def _logprobs(parts: Iterable[Delta]) -> dict[str, Any]:
    scored = [_scored(part.scored) for part in parts if part.scored]
    return {"logprobs": scored} if scored else {}


def _scored(scored: ScoredToken) -> dict[str, Any]:
    return {**_score(scored.chosen), "top_logprobs": [_score(each) for each in scored.likeliest]}


def _score(score: TokenScore) -> dict[str, Any]:
    token = score.token.decode(errors="replace")
    return {"token": token, "logprob": score.logprob, "bytes": list(score.token)}
