"""The bodies of Ollama's requests, checked. What is not supported is refused by name.

https://docs.ollama.com/api
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from cake.api.bodies import (
    ANY_OBJECT,
    NO_PREFIX,
    QUESTION,
    WHOLE,
    Body,
    Finite,
    Index,
    ModelName,
    Natural,
    No,
    Penalty,
    Scored,
    Stop,
    Stops,
    Tool,
)
from cake.api.task import Asked
from cake.tools import Offer, read_offer

Name = ModelName | Annotated[str, Field(pattern="^.+:latest$")]  # Ollama's way to say a version
NameOrNone = Name | Literal[""]
ABOUT_FIELDS = {"default", "description", "examples"}  # what a schema says beside what may be there
ALL_TOKENS = 1 << 30  # more than any context holds


def _or_null(schema: dict[str, Any]) -> None:
    """Say of a body's schema what `OllamaBody` lets pass."""
    schema["additionalProperties"] = {"enum": [None, "", []]}
    for name, kind in schema["properties"].items():
        may_be = kind.pop("anyOf", None) or [
            {key: kind.pop(key) for key in list(kind) if key not in ABOUT_FIELDS}
        ]
        has_null = name in schema.get("required", ()) or {"type": "null"} in may_be
        kind["anyOf"] = may_be if has_null else [*may_be, {"type": "null"}]


class OllamaBody(Body):
    """What clients fill in where they want nothing is no reason to refuse: null, empty texts and lists."""

    model_config = ConfigDict(json_schema_extra=_or_null)

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        said = {key: value for key, value in given.items() if value is not None}
        return {key: value for key, value in said.items() if key in cls.model_fields or value not in ("", [])}


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


class Options(OllamaBody):
    """How an answer is made."""

    num_ctx: Natural | None = None  # no more than is served
    num_predict: Annotated[int, Field(ge=-2), WHOLE] | None = None  # what is not above zero is no limit
    temperature: Annotated[Finite, Field(ge=0)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Index | None = None
    seed: Annotated[int, Field(ge=-1, lt=2**63), WHOLE] | None = None  # -1 draws one
    stop: Annotated[Stops, BeforeValidator(_listed, json_schema_input_type=Stop | Stops)] | None = None
    repeat_penalty: Annotated[Finite, Field(ge=0.01, le=100)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1), WHOLE] | None = None  # -1 is all
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """The fields of `Asked`."""
        return {
            "max_tokens": self.num_predict if (self.num_predict or 0) > 0 else None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": secrets.randbits(63) if self.seed == -1 else self.seed,
            "stops": self.stop or (),
            "repeat_penalty": self.repeat_penalty,
            "repeat_last_n": ALL_TOKENS if self.repeat_last_n == -1 else self.repeat_last_n,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }


class Generated(OllamaBody, Scored):
    """What requests of both kinds can ask for."""

    model: Name
    stream: bool = True
    format: Literal["", "json"] | Mapping[str, Any] | None = None
    options: Options = Field(default_factory=Options)
    keep_alive: str | float | None = None  # the model stays in any case
    think: No | None = None

    @field_validator("format", mode="before")
    @classmethod
    def _of_json(cls, wanted: object) -> object:
        if wanted not in ("", "json") and not isinstance(wanted, Mapping):
            raise ValueError("json, or a JSON schema")
        return wanted

    @property
    def asked(self) -> Asked:
        """As every dialect says it."""
        return Asked(**self.options.asked, n_scored=self.n_scored, schema=self._schema)

    @property
    def _schema(self) -> Mapping[str, Any] | None:
        if isinstance(self.format, str):
            return ANY_OBJECT if self.format == "json" else None
        return self.format


class Function(OllamaBody):
    """A tool, and with what it was called."""

    name: str
    arguments: Mapping[str, Any] = Field(default_factory=dict)
    index: Annotated[int, WHOLE] | None = None


class ToolCall(OllamaBody):
    """A call of a tool, from an earlier answer."""

    function: Function
    id: str | None = None
    type: Literal["function"] | None = None

    @property
    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"type": "function", "function": function, **({"id": self.id} if self.id else {})}


class Message(OllamaBody):
    """One message of a chat; pictures are refused."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    @property
    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        calls = [call.for_template for call in self.tool_calls or ()]
        given = {"name": self.tool_name, "tool_call_id": self.tool_call_id, "tool_calls": calls}
        told = {"role": self.role, "content": self.content or ""}
        return told | {key: value for key, value in given.items() if value}


class ChatRequest(Generated):
    """`POST /api/chat`."""

    messages: list[Message] = Field(default_factory=list, examples=[QUESTION])  # none: only load the model
    tools: Sequence[Tool] | None = None

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> "ChatRequest":
        if self.messages and self.messages[-1].role == "assistant":
            raise ValueError(NO_PREFIX)
        return self

    @property
    def offer(self) -> Offer:
        """The tools. Raises `CakeError` where they are not understood."""
        return read_offer(self.tools or (), None)


class GenerateRequest(Generated):
    """`POST /api/generate`."""

    prompt: Annotated[str, Field(examples=["Hello!"])] = ""  # none: only load the model
    system: str = ""
    raw: bool = False  # no chat template: the prompt as it is

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as a chat."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


class ShowRequest(OllamaBody):
    """`POST /api/show`."""

    model: NameOrNone = ""
    name: NameOrNone = ""  # as older clients call it
    verbose: bool = False  # there is no more to tell
