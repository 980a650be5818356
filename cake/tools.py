"""Tools that a model may call: what it is told of them, and what it is held to when it must call one.

Tools and messages come in OpenAI's shape. The model's chat template says how they look in the prompt;
`cake.tool_calls` reads the calls out of the answer. Knows nothing of HTTP, and runs no tool.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cake.errors import CakeError
from cake.model.grammar import json_rule

NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# An answer in which `cake.tool_calls` finds no call, wherever it is read to.
TEXT_RULE = r"""
TEXT: /([^{<\[\];,\s](.|\n)*)?/ & ~MARKED & ~BUILT_IN
MARKED: /(.|\n)*<(function=|\|python_tag\|)(.|\n)*/
BUILT_IN: /[A-Za-z0-9_.-]+\.call\((.|\n)*/
"""


@dataclass(frozen=True)
class Tool:
    """A function that the client runs."""

    name: str
    parameters: Mapping[str, Any]  # a JSON schema
    strict: bool  # whether its arguments must keep to the schema even where it need not be called
    given: Mapping[str, Any]  # as the client described it, for the template


@dataclass(frozen=True)
class Offer:
    """The tools of a request, and whether the answer must be a call."""

    tools: Sequence[Tool]  # none if the model is not to know of any
    forced: Sequence[Tool] = ()  # one of them must be called

    @property
    def names(self) -> frozenset[str]:
        """Of the tools that the answer may call."""
        return frozenset(tool.name for tool in self.forced or self.tools)

    @property
    def for_template(self) -> list[Mapping[str, Any]]:
        """As chat templates take them."""
        return [tool.given for tool in self.tools]

    @property
    def grammar(self) -> str | None:
        """What holds the answer to what was asked for, for `Grammars.lark`; None if anything goes."""
        if self.forced:
            return _calls(self.forced)
        if any(tool.strict for tool in self.tools):
            return _calls(self.tools, " | TEXT") + TEXT_RULE
        return None


def read_offer(tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] | None) -> Offer:
    """OpenAI's `tools` and `tool_choice`. Raises `CakeError` where they are not understood."""
    known = [_tool(given) for given in tools]
    names = [tool.name for tool in known]
    if len(set(names)) < len(names):
        raise CakeError(f"two tools are called {max(names, key=names.count)!r}; give each its own name")
    if choice is None or choice == "auto":
        return Offer(known)
    if choice == "none":
        return Offer([])
    if not known:
        raise CakeError("tool_choice asks for a call, but there are no tools")
    if choice == "required":
        return Offer(known, known)
    return Offer(known, [tool for tool in known if tool.name == _named(choice, names)])


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a chat as templates take them: the arguments of calls are objects, not text."""
    return [_template_message(message) for message in messages]


def _template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    changed = {**message, "content": message.get("content") or ""}
    calls = changed.pop("tool_calls", None)
    if calls:
        changed["tool_calls"] = [{**call, "function": _function_of(call)} for call in calls]
    return changed


def _function_of(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise CakeError("a call in tool_calls has no function with a name")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise CakeError(
                f"the arguments of a call of {function['name']!r} are no JSON: {error}"
            ) from error
    if not isinstance(arguments, Mapping):
        raise CakeError(f"the arguments of a call of {function['name']!r} are no JSON object")
    return {"name": function["name"], "arguments": arguments}


def _tool(given: Mapping[str, Any]) -> Tool:
    kind, function = given.get("type", "function"), given.get("function")
    if kind != "function":
        raise CakeError(f"tools of type {kind!r} are not supported; only functions are")
    if not isinstance(function, Mapping):
        raise CakeError("a tool has no 'function' that says its name and parameters")
    name, parameters = function.get("name"), function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise CakeError(
            f"{name!r} cannot be a tool's name; use letters, digits, '_', '-' and '.', at most 64"
        )
    if not isinstance(parameters, Mapping):
        raise CakeError(f"the parameters of the tool {name!r} are no JSON schema")
    return Tool(name, parameters, bool(function.get("strict")), given)


def _named(choice: str | Mapping[str, Any], names: Sequence[str]) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise CakeError(f"tool_choice {choice!r} is not known; say none, auto, required, or name a function")
    if name not in names:
        raise CakeError(f"tool_choice names {name!r}, which is none of the tools: {', '.join(names)}")
    return name


def _calls(tools: Sequence[Tool], otherwise: str = "") -> str:
    """One call of one of the tools, as Llama 3.1 was trained to write it."""
    lines = [f"start: ({' | '.join(f'call_{i}' for i in range(len(tools)))}){otherwise}"]
    for i, tool in enumerate(tools):
        before = json.dumps(f'{{"name": "{tool.name}", "parameters": ')
        lines.append(f'call_{i}: {before} arguments_{i} "}}"\narguments_{i}: {json_rule(tool.parameters)}')
    return "\n".join(lines)
