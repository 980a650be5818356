"""Answers and errors in OpenAI's shapes: whole, and as a stream of chunks. Knows nothing of HTTP."""

import secrets
import time
from collections.abc import Iterable, Sequence

from cake.api.answers import ErrorAnswer
from cake.api.errors import ApiError
from cake.api.openai.answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Common,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    LastChatChunk,
    Said,
    ToolCall,
    Usage,
)
from cake.api.scores import chosen, readable
from cake.api.task import Delta, ScoredToken, Task
from cake.tool_calls import Call


class ChatShape:
    """Of chat completions."""

    def __init__(self, model: str) -> None:
        self._common: Common = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._n_calls: dict[int, int] = {}  # of each answer

    def whole(self, task: Task, answers: Sequence[Sequence[Delta]]) -> ChatCompletion:
        """The answers as one object."""
        choices: list[ChatChoice] = [
            {
                "index": i,
                "message": _message(parts),
                "logprobs": _logprobs(parts),
                "finish_reason": choice.finish_reason,
            }
            for i, (choice, parts) in enumerate(zip(task.choices, answers, strict=True))
        ]
        return {**self._common, "object": "chat.completion", "choices": choices, "usage": _usage(task)}

    def first(self, number: int) -> ChatChunk:
        """The chunk that says who speaks."""
        return self._chunk(number, {"role": "assistant", "content": ""})

    def part(self, number: int, part: Delta) -> ChatChunk:
        """A piece of an answer."""
        delta: ChatDelta = {"content": part.text} if part.text else {}
        if part.calls:
            first = self._n_calls.get(number, 0)
            self._n_calls[number] = first + len(part.calls)
            delta["tool_calls"] = [{"index": i, **_call(call)} for i, call in enumerate(part.calls, first)]
        return self._chunk(number, delta, logprobs=_logprobs([part]))

    def last(self, number: int, task: Task) -> ChatChunk:
        """Why an answer ended."""
        return self._chunk(number, {}, task.choices[number].finish_reason)

    def usage(self, task: Task) -> LastChatChunk:
        """How many tokens it were."""
        return {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": _usage(task)}

    def _chunk(
        self, number: int, delta: ChatDelta, reason: str | None = None, logprobs: ChatLogprobs | None = None
    ) -> ChatChunk:
        choice: ChatChunkChoice = {
            "index": number,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}


class CompletionShape:
    """Of plain completions."""

    def __init__(self, model: str, echoed: str = "") -> None:
        self._common: Common = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._echoed = echoed
        self._lengths: dict[int, int] = {}  # characters of each answer so far

    def whole(self, task: Task, answers: Sequence[Sequence[Delta]]) -> Completion:
        """The answers as one object."""
        choices = [
            self._choice(i, self._echoed + _text(parts), choice.finish_reason, self._logprobs(i, parts))
            for i, (choice, parts) in enumerate(zip(task.choices, answers, strict=True))
        ]
        return {**self._common, "object": "text_completion", "choices": choices, "usage": _usage(task)}

    def first(self, number: int) -> CompletionChunk:
        """The chunk that repeats the prompt, where that was asked for."""
        return self._chunk(self._choice(number, self._echoed))

    def part(self, number: int, part: Delta) -> CompletionChunk:
        """A piece of an answer."""
        return self._chunk(self._choice(number, part.text, logprobs=self._logprobs(number, [part])))

    def last(self, number: int, task: Task) -> CompletionChunk:
        """Why an answer ended."""
        return self._chunk(self._choice(number, "", task.choices[number].finish_reason))

    def usage(self, task: Task) -> Completion:
        """How many tokens it were."""
        return {**self._common, "object": "text_completion", "choices": [], "usage": _usage(task)}

    def _chunk(self, choice: CompletionChoice) -> CompletionChunk:
        return {**self._common, "object": "text_completion", "choices": [choice]}

    def _choice(
        self, number: int, text: str, reason: str | None = None, logprobs: CompletionLogprobs | None = None
    ) -> CompletionChoice:
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, number: int, parts: Sequence[Delta]) -> CompletionLogprobs | None:
        """Four lists, an entry a token; a token's place is that of the text which it completed."""
        scored: list[ScoredToken] = []
        offsets: list[int] = []
        for part in parts:
            if part.scored:
                scored.append(part.scored)
                offsets.append(self._lengths.get(number, 0))
            self._lengths[number] = self._lengths.get(number, 0) + len(part.text)
        if not scored:
            return None
        return {
            "tokens": [readable(each.chosen.token) for each in scored],
            "token_logprobs": [each.chosen.logprob for each in scored],
            "top_logprobs": [{readable(t.token): t.logprob for t in each.likeliest} for each in scored],
            "text_offset": offsets,
        }


def error_body(error: ApiError) -> ErrorAnswer:
    """The JSON object that tells of an error."""
    return {"error": {"message": str(error), "type": error.kind, "param": None, "code": error.code}}


def _usage(task: Task) -> Usage:
    n_prompt = len(task.prompt)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": task.n_tokens,
        "total_tokens": n_prompt + task.n_tokens,
        "prompt_tokens_details": {"cached_tokens": task.n_cached},
    }


def _text(parts: Iterable[Delta]) -> str:
    return "".join(part.text for part in parts)


def _message(parts: Sequence[Delta]) -> Said:
    text, calls = _text(parts), [_call(call) for part in parts for call in part.calls]
    message: Said = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return message


def _call(call: Call) -> ToolCall:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(parts: Iterable[Delta]) -> ChatLogprobs | None:
    content = [chosen(part.scored) for part in parts if part.scored]
    return {"content": content, "refusal": None} if content else None
