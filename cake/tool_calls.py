"""Calls of tools, read out of a model's answer while it is being written.

Llama 3.1 and 3.2 call tools in these ways, with `<|python_tag|>` before them or without:

- `{"name": "weather", "parameters": {"town": "Rome"}}`, also with "arguments" for "parameters" or
  `"type": "function"`, and several of them with `;` or `,` or nothing between, or as a list;
- `<function=weather>{"town": "Rome"}</function>`, which may come behind other text too;
- `weather.call(town="Rome")`, the form of the built-in tools.

What calls no tool that was offered, or breaks off before its end, is text. Knows nothing of tokens; whether
arguments fit their schema is not looked at.
"""

import contextlib
import itertools
import json
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

TAG, FUNCTION = "<|python_tag|>", "<function="
BETWEEN = re.compile(rf"(?:\s|[;,\[\]]|{re.escape(TAG)}|</function>)*")
MARKER = re.compile(rf"{re.escape(TAG)}|{FUNCTION}")
FIRST_KEY = re.compile(r'\{\s*(?:"(?:(?:name|type|function|parameters|arguments)"|[a-z]*$)|$)')
OPENING = re.compile(r"<function=([\w.-]*)(?:>\s*|$)")
BUILT_IN = re.compile(r'([\w.-]+)\.call\(((?:[^()"]|"(?:[^"\\]|\\.)*")*)\)')
ARGUMENT = re.compile(r'\s*(\w+)\s*=\s*("(?:[^"\\]|\\.)*"|[^\s",]+)\s*(?:,|$)')


def _refuse(constant: str) -> None:
    """Python would read NaN and Infinity, which are no JSON."""
    raise ValueError(constant)


DECODER = json.JSONDecoder(parse_constant=_refuse)


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` is a JSON object as text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}", compare=False)


class Unfinished(Exception):  # noqa: N818 - no error
    """What may be a call when more has come."""


class CallReader:
    """Takes in an answer piece by piece, and gives out its text and its calls in their order.

    Text comes out as soon as it cannot be a call any more, a call as soon as it is complete.
    """

    def __init__(self, names: Collection[str]) -> None:
        """`names` are those of the tools that may be called."""
        self._names, self._held = names, ""
        self._in_text, self._called = False, False

    def feed(self, text: str) -> list[str | Call]:
        """What is certain after this piece."""
        self._held += text
        return _merged(self._read())

    def finish(self) -> list[str | Call]:
        """What was held back, at the end of the answer."""
        found: list[str | Call] = []
        while self._held:
            found += self._read()
            if self._called and not self._in_text:
                self._held = BETWEEN.sub("", self._held, count=1)
            found.append(self._given(len(self._held) if self._in_text else 1))
            self._in_text = True
        return _merged(each for each in found if each != "")

    def _read(self) -> Iterator[str | Call]:
        with contextlib.suppress(Unfinished):
            while self._held:
                found = self._text() if self._in_text else self._call_or_text()
                if found != "":
                    yield found

    def _call_or_text(self) -> str | Call:
        """The call that stands here; where there is none, text begins."""
        between = BETWEEN.match(self._held)
        start = between.end() if between is not None else 0
        call, end = self._call(self._held[start:])
        if call is None:
            self._in_text = True
            if self._called:  # what stands between calls is no text
                self._given(start)
                start = 0
            return self._given(start + 1)
        self._held, self._called = self._held[start + end :], True
        return call

    def _text(self) -> str:
        """Up to where a call may begin."""
        marker = MARKER.search(self._held)
        if marker is not None:
            self._in_text = False
            return self._given(marker.start())
        end = len(self._held) - _beginning_of_marker(self._held)
        if end == 0:
            raise Unfinished
        return self._given(end)

    def _given(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _call(self, text: str) -> tuple[Call | None, int]:
        """A call at the beginning of `text`, and where it ends."""
        if not text or any(marker.startswith(text) for marker in (TAG, FUNCTION, "</function>")):
            raise Unfinished
        if text[0] == "{":
            return self._json_call(text)
        if text.startswith(FUNCTION):
            return self._tagged_call(text)
        return self._built_in_call(text)

    def _json_call(self, text: str) -> tuple[Call | None, int]:
        if not FIRST_KEY.match(text):
            return None, 0
        said, end = _object(text)
        inner = said.get("function")
        if isinstance(inner, Mapping):
            said = inner
        name = said.get("name", inner)
        return self._known(name, said.get("parameters", said.get("arguments"))), end

    def _tagged_call(self, text: str) -> tuple[Call | None, int]:
        opening = OPENING.match(text)
        if opening is None or opening[1] not in self._names:
            if opening is not None and opening.end() == len(text):
                raise Unfinished
            return None, 0
        arguments, end = _object(text[opening.end() :])
        return self._known(opening[1], arguments), opening.end() + end

    def _built_in_call(self, text: str) -> tuple[Call | None, int]:
        beginnings = [f"{name}.call(" for name in self._names]
        if any(beginning.startswith(text) for beginning in beginnings):
            raise Unfinished
        if not text.startswith(tuple(beginnings)):
            return None, 0
        call = BUILT_IN.match(text)
        if call is None:
            raise Unfinished
        pairs = {name: _value(value) for name, value in ARGUMENT.findall(call[2])}
        return self._known(call[1], pairs), call.end()

    def _known(self, name: Any, arguments: Any) -> Call | None:
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments or {}, Mapping):
            return None
        return Call(name, json.dumps(arguments or {}))


def _merged(found: Iterable[str | Call]) -> list[str | Call]:
    """Each run of texts as one."""
    runs = itertools.groupby(found, lambda each: isinstance(each, str))
    return [each for texts, run in runs for each in (["".join(map(str, run))] if texts else run)]


def _object(text: str) -> tuple[Any, int]:
    """The JSON object at the beginning of `text`, and where it ends."""
    if text and text[0] != "{":
        return {}, 0
    try:
        return DECODER.raw_decode(text)
    except (ValueError, RecursionError) as error:  # what is wrong is not told from what is not there yet
        raise Unfinished from error


def _value(text: str) -> Any:
    """An argument of a built-in call: JSON, or else a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _beginning_of_marker(text: str) -> int:
    """How many of the last characters may become a marker."""
    lengths = range(min(len(TAG) - 1, len(text)), 0, -1)
    return next((n for n in lengths if any(m.startswith(text[-n:]) for m in (TAG, FUNCTION))), 0)
