"""Answers in OpenAI's shapes: whole, and as a stream of chunks. Knows nothing of HTTP."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from cake.api.service import Task
from cake.tool_calls import Call


class ChatShape:
    """Of chat completions."""

    def __init__(self, model: str) -> None:
        self._common = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._n_calls = 0

    def whole(self, task: Task, parts: Sequence[str | Call]) -> dict[str, Any]:
        """The answer as one object."""
        text = "".join(part for part in parts if isinstance(part, str))
        calls = [_call(part) for part in parts if isinstance(part, Call)]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text or (None if calls else ""),
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": task.finish_reason}
        return {**self._common, "object": "chat.completion", "choices": [choice], "usage": task.usage}

    def first(self) -> dict[str, Any]:
        """The chunk that says who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def part(self, part: str | Call) -> dict[str, Any]:
        """A piece of the answer."""
        if isinstance(part, str):
            return self._chunk({"content": part})
        self._n_calls += 1
        return self._chunk({"tool_calls": [{"index": self._n_calls - 1, **_call(part)}]})

    def last(self, task: Task) -> dict[str, Any]:
        """Why it ended."""
        return self._chunk({}, task.finish_reason)

    def usage(self, task: Task) -> dict[str, Any]:
        """How many tokens it were."""
        return {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": task.usage}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}


class CompletionShape:
    """Of plain completions."""

    def __init__(self, model: str, echoed: str = "") -> None:
        self._common = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._echoed = echoed

    def whole(self, task: Task, parts: Sequence[str | Call]) -> dict[str, Any]:
        """The answer as one object."""
        text = self._echoed + "".join(part for part in parts if isinstance(part, str))
        return {**self._choice(text, task.finish_reason), "usage": task.usage}

    def first(self) -> dict[str, Any]:
        """The chunk that repeats the prompt, where that was asked for."""
        return self._choice(self._echoed)

    def part(self, part: str | Call) -> dict[str, Any]:
        """A piece of the answer."""
        assert isinstance(part, str), "completions know no tools"
        return self._choice(part)

    def last(self, task: Task) -> dict[str, Any]:
        """Why it ended."""
        return self._choice("", task.finish_reason)

    def usage(self, task: Task) -> dict[str, Any]:
        """How many tokens it were."""
        return {**self._common, "choices": [], "usage": task.usage}

    def _choice(self, text: str, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {**self._common, "choices": [choice]}


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
