"""Answers and errors in Ollama's shapes: one object, or a line of JSON for each piece."""

import json
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from cake.api.errors import ApiError
from cake.api.handlers import LINES
from cake.api.ollama.answers import (
    Answered,
    AssistantSaid,
    CallMade,
    ChatAnswer,
    ChatLoaded,
    ChatPiece,
    Ending,
    GenerateAnswer,
    GenerateLoaded,
    GeneratePiece,
    OllamaError,
    Scored,
)
from cake.api.scores import chosen
from cake.api.task import Delta, Task
from cake.tool_calls import Call


class Reply:
    """An answer that is timed from here on."""

    media_type = LINES

    def __init__(self, model: str) -> None:
        """`model` is what the client calls it."""
        self._model, self._began_s = model, time.perf_counter()

    def begin(self, task: Task) -> str:
        """Nothing is said before there is something to say."""
        return ""

    def part(self, number: int, part: Delta) -> str:
        """A piece of the answer."""
        return _line(self._piece(part))

    def end(self, task: Task) -> str:
        """Why it ended, and how long it took."""
        return _line(self._last(task))

    def failed(self, error: ApiError) -> str:
        """An error amid the answer."""
        return _line(error_body(error))

    @abstractmethod
    def _piece(self, part: Delta) -> ChatPiece | GeneratePiece:
        """What a line says that is not the last."""

    @abstractmethod
    def _last(self, task: Task) -> ChatAnswer | GenerateAnswer:
        """What the last line says."""

    def _answered(self) -> Answered:
        return {"model": self._model, "created_at": now()}

    def _ending(self, task: Task) -> Ending:
        """The model is loaded already: in place of that stands the wait for a turn."""
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

    @property
    def loaded(self) -> ChatLoaded:
        """To one without messages: the model is there."""
        return {**self._answered(), "message": _message([]), "done": True, "done_reason": "load"}

    def whole(self, task: Task, answers: Sequence[Sequence[Delta]]) -> ChatAnswer:
        """The answer as one object."""
        (parts,) = answers
        said = _message(parts)
        return {**self._answered(), "message": said, **_scores(parts), **self._ending(task)}

    def _piece(self, part: Delta) -> ChatPiece:
        return {**self._answered(), "message": _message([part]), "done": False, **_scores([part])}

    def _last(self, task: Task) -> ChatAnswer:
        return self.whole(task, [[]])


class TextReply(Reply):
    """To a single prompt."""

    @property
    def loaded(self) -> GenerateLoaded:
        """To an empty one: the model is there."""
        return {**self._answered(), "response": "", "done": True, "done_reason": "load"}

    def whole(self, task: Task, answers: Sequence[Sequence[Delta]]) -> GenerateAnswer:
        """The answer as one object."""
        (parts,) = answers
        return {**self._answered(), "response": _text(parts), **_scores(parts), **self._ending(task)}

    def _piece(self, part: Delta) -> GeneratePiece:
        return {**self._answered(), "response": part.text, "done": False, **_scores([part])}

    def _last(self, task: Task) -> GenerateAnswer:
        return self.whole(task, [[]])


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


def _text(parts: Iterable[Delta]) -> str:
    return "".join(part.text for part in parts)


def _message(parts: Sequence[Delta]) -> AssistantSaid:
    message: AssistantSaid = {"role": "assistant", "content": _text(parts)}
    calls = [_call(call) for part in parts for call in part.calls]
    if calls:
        message["tool_calls"] = calls
    return message


def _call(call: Call) -> CallMade:
    return {"id": call.id, "function": {"name": call.name, "arguments": json.loads(call.arguments)}}


def _scores(parts: Iterable[Delta]) -> Scored:
    scored = [chosen(part.scored) for part in parts if part.scored]
    return {"logprobs": scored} if scored else {}
