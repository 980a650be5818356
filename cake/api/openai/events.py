"""OpenAI's shapes as answers are sent in them: chunks become server-sent events."""

from collections.abc import Mapping, Sequence
from typing import Any

from cake.api.errors import ApiError
from cake.api.handlers import EVENTS, event
from cake.api.openai.shapes import ChatShape, CompletionShape, error_body
from cake.api.task import Delta, Task

DONE = "[DONE]"
LAST = f"data: {DONE}\n\n"


class Events:
    """Answers of one of the two kinds."""

    media_type = EVENTS

    def __init__(self, shape: ChatShape | CompletionShape, usage: bool) -> None:
        """With `usage` a stream ends with the count of its tokens."""
        self._shape, self._usage = shape, usage

    def whole(self, task: Task, answers: Sequence[Sequence[Delta]]) -> Mapping[str, Any]:
        """The answers as one object."""
        return self._shape.whole(task, answers)

    def begin(self, task: Task) -> str:
        """The first chunk of each answer."""
        return "".join(event(self._shape.first(number)) for number in range(task.n))

    def part(self, number: int, part: Delta) -> str:
        """A piece of an answer."""
        return event(self._shape.part(number, part))

    def end(self, task: Task) -> str:
        """The last chunk of each answer, and what is sent when there is no more."""
        last = [event(self._shape.last(number, task)) for number in range(task.n)]
        return "".join([*last, event(self._shape.usage(task)) if self._usage else "", LAST])

    def failed(self, error: ApiError) -> str:
        """An error alone: nobody shall take its answer for a whole one."""
        return event(error_body(error))
