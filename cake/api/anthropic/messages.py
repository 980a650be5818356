"""Answers and errors in Anthropic's shapes: one message, or the events from which it is put together."""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

from cake.api.errors import ApiError
from cake.api.handlers import EVENTS
from cake.api.task import Delta, Task
from cake.tool_calls import Call

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class AnthropicFault(TypedDict):
    """What was wrong."""

    type: str
    message: str


class AnthropicError(TypedDict):
    """Every answer of another status than 200."""

    type: Literal["error"]
    error: AnthropicFault


class MessageReply:
    """One answer. Its text and its calls are blocks, which come one after the other."""

    media_type = EVENTS

    def __init__(self, model: str, max_tokens: int) -> None:
        """`max_tokens` is what was asked for; the context may have had room for less."""
        self._model, self._max_tokens = model, max_tokens
        self._id = f"msg_{secrets.token_hex(12)}"
        self._n_blocks, self._in_text = 0, False  # of a stream, so far

    def whole(self, task: Task, answers: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """The answer as one object."""
        (parts,) = answers
        return self._message(_blocks(parts), self._ending(task), _usage(task))

    def begin(self, task: Task) -> str:
        """An empty message. How much of the prompt a session holds is not known yet."""
        usage = {"input_tokens": len(task.prompt), "output_tokens": 0}
        nothing = {"stop_reason": None, "stop_sequence": None}
        return _event("message_start", message=self._message([], nothing, usage))

    def part(self, number: int, part: Delta) -> str:
        """More of a block of text, and whole blocks of calls."""
        return self._of_text(part.text) + "".join(self._of_call(call) for call in part.calls)

    def end(self, task: Task) -> str:
        """Why it ended, and the tokens as they have come out."""
        ending = _event("message_delta", delta=self._ending(task), usage=_usage(task))
        return self._end_of_text() + ending + _event("message_stop")

    def failed(self, error: ApiError) -> str:
        """An error amid the answer."""
        return _event("error", **{key: value for key, value in error_body(error).items() if key != "type"})

    def _of_text(self, text: str) -> str:
        if not text:
            return ""
        start = "" if self._in_text else self._start(_text_block(""))
        self._in_text = True
        return start + self._delta({"type": "text_delta", "text": text})

    def _of_call(self, call: Call) -> str:
        arguments = {"type": "input_json_delta", "partial_json": call.arguments}
        return (
            self._end_of_text() + self._start(_call_block(call, {})) + self._delta(arguments) + self._stop()
        )

    def _end_of_text(self) -> str:
        if not self._in_text:
            return ""
        self._in_text = False
        return self._stop()

    def _start(self, block: Mapping[str, Any]) -> str:
        self._n_blocks += 1
        return self._of_block("start", content_block=block)

    def _delta(self, delta: Mapping[str, Any]) -> str:
        return self._of_block("delta", delta=delta)

    def _stop(self) -> str:
        return self._of_block("stop")

    def _of_block(self, what: str, **fields: object) -> str:
        return _event(f"content_block_{what}", index=self._n_blocks - 1, **fields)

    def _message(
        self, blocks: Sequence[Mapping[str, Any]], ending: Mapping[str, Any], usage: Mapping[str, int]
    ) -> dict[str, Any]:
        said = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return {**said, "content": blocks, **ending, "usage": usage}

    def _ending(self, task: Task) -> dict[str, Any]:
        (choice,) = task.choices
        if choice.finish_reason == "tool_calls":
            reason = "tool_use"
        elif choice.finish_reason == "length":
            is_full = choice.n_tokens < self._max_tokens
            reason = "model_context_window_exceeded" if is_full else "max_tokens"
        else:
            reason = "end_turn" if choice.stop is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": choice.stop if reason == "stop_sequence" else None}


def error_body(error: ApiError) -> AnthropicError:
    """The JSON object that tells of an error."""
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    kind = "overloaded_error" if error.code == "busy" else ERROR_TYPES.get(error.status, usual)
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def _event(kind: str, **fields: object) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n"


def _blocks(parts: Iterable[Delta]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    for part in parts:
        if part.text:
            if not blocks or blocks[-1]["type"] != "text":
                blocks.append(_text_block(""))
            blocks[-1]["text"] += part.text
        blocks += [_call_block(call, json.loads(call.arguments)) for call in part.calls]
    return blocks


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "citations": None}


def _call_block(call: Call, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _usage(task: Task) -> dict[str, int]:
    """Those tokens of the prompt that were run are told apart from those that a session held."""
    return {
        "input_tokens": len(task.prompt) - task.n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": task.n_cached,
        "output_tokens": task.n_tokens,
    }
