"""Answers and errors in Anthropic's shapes: one message, or the events from which it is put together."""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cake.api.anthropic.answers import (
    AnthropicError,
    BlockSaid,
    InputDelta,
    MessageEnding,
    MessageEvent,
    MessageSaid,
    StopReason,
    TextDelta,
    TextSaid,
    TokensUsed,
    ToolUsed,
)
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


class MessageReply:
    """One answer. Its text and its calls are blocks, which come one after the other."""

    media_type = EVENTS

    def __init__(self, model: str, max_tokens: int) -> None:
        """`max_tokens` is what was asked for; the context may have had room for less."""
        self._model, self._max_tokens = model, max_tokens
        self._id = f"msg_{secrets.token_hex(12)}"
        self._n_blocks, self._in_text = 0, False  # of a stream, so far

    def whole(self, task: Task, answers: Sequence[Sequence[Delta]]) -> MessageSaid:
        """The answer as one object."""
        (parts,) = answers
        return self._message(_blocks(parts), self._ending(task), _usage(task))

    def begin(self, task: Task) -> str:
        """An empty message. How much of the prompt a session holds is not known yet."""
        usage: TokensUsed = {"input_tokens": len(task.prompt), "output_tokens": 0}
        message = self._message([], {"stop_reason": None, "stop_sequence": None}, usage)
        return _event({"type": "message_start", "message": message})

    def part(self, number: int, part: Delta) -> str:
        """More of a block of text, and whole blocks of calls."""
        return self._of_text(part.text) + "".join(self._of_call(call) for call in part.calls)

    def end(self, task: Task) -> str:
        """Why it ended, and the tokens as they have come out."""
        ending = _event({"type": "message_delta", "delta": self._ending(task), "usage": _usage(task)})
        return self._end_of_text() + ending + _event({"type": "message_stop"})

    def failed(self, error: ApiError) -> str:
        """An error amid the answer."""
        return _event(error_body(error))

    def _of_text(self, text: str) -> str:
        if not text:
            return ""
        start = "" if self._in_text else self._start(_text_block(""))
        self._in_text = True
        return start + self._delta({"type": "text_delta", "text": text})

    def _of_call(self, call: Call) -> str:
        text_ends, start = self._end_of_text(), self._start(_call_block(call, {}))
        arguments = self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        return text_ends + start + arguments + self._stop()

    def _end_of_text(self) -> str:
        if not self._in_text:
            return ""
        self._in_text = False
        return self._stop()

    def _start(self, block: BlockSaid) -> str:
        self._n_blocks += 1
        return _event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _delta(self, delta: TextDelta | InputDelta) -> str:
        return _event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _stop(self) -> str:
        return _event({"type": "content_block_stop", "index": self._index})

    @property
    def _index(self) -> int:
        return self._n_blocks - 1

    def _message(self, blocks: list[BlockSaid], ending: MessageEnding, usage: TokensUsed) -> MessageSaid:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            **ending,
            "usage": usage,
        }

    def _ending(self, task: Task) -> MessageEnding:
        (choice,) = task.choices
        reason: StopReason
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


def _event(event: MessageEvent) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"


def _blocks(parts: Iterable[Delta]) -> list[BlockSaid]:
    blocks: list[BlockSaid] = []
    for part in parts:
        if part.text:
            last = blocks[-1] if blocks else None
            if last and last["type"] == "text":
                last["text"] += part.text
            else:
                blocks.append(_text_block(part.text))
        blocks += [_call_block(call, json.loads(call.arguments)) for call in part.calls]
    return blocks


def _text_block(text: str) -> TextSaid:
    return {"type": "text", "text": text, "citations": None}


def _call_block(call: Call, arguments: Mapping[str, Any]) -> ToolUsed:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _usage(task: Task) -> TokensUsed:
    """Those tokens of the prompt that were run are told apart from those that a session held."""
    return {
        "input_tokens": len(task.prompt) - task.n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": task.n_cached,
        "output_tokens": task.n_tokens,
    }
