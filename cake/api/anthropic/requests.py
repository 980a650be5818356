"""The bodies of Anthropic's requests, checked. What is not supported is refused by name.

https://platform.claude.com/docs/en/api/messages
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from cake.api.bodies import NO_PREFIX, QUESTION, Body, Finite, Index, ModelName, Natural, No, Stops, ToolName
from cake.api.task import Asked
from cake.tools import Offer, read_offer


class Block(Body):
    """A part of a message."""

    cache_control: Mapping[str, Any] | None = None  # what prompts have in common is kept in any case


class TextBlock(Block):
    """Text."""

    type: Literal["text"]
    text: str
    citations: None = None


class ToolUseBlock(Block):
    """A call of a tool, from an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Mapping[str, Any]

    @property
    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.name, "arguments": json.dumps(self.input)}
        return {"id": self.id, "type": "function", "function": function}


def _kind(content: object) -> str:
    return "text" if isinstance(content, str) else "blocks"


Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextBlock], Tag("blocks")], Discriminator(_kind)
]


class ToolResultBlock(Block):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Text = ""
    is_error: bool = False

    @property
    def for_template(self) -> dict[str, Any]:
        """As chat templates take it; they know no other way to tell of an error than in words."""
        text = _text(self.content)
        content = f"Error: {text}" if self.is_error else text
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": content}


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ToolUseBlock, Field(discriminator="type")]


class SystemMessage(Body):
    """What the model is told to do."""

    role: Literal["system"]
    content: Text

    @property
    def for_template(self) -> list[dict[str, Any]]:
        """As chat templates take it."""
        return [{"role": "system", "content": _text(self.content)}]


class UserMessage(Body):
    """What the user says, and what came of calls."""

    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[UserBlock], Field(min_length=1), Tag("blocks")],
        Discriminator(_kind),
    ]

    @property
    def for_template(self) -> list[dict[str, Any]]:
        """As chat templates take it: each result is a message of its own."""
        if isinstance(self.content, str):
            return [{"role": "user", "content": self.content}]
        told: list[dict[str, Any]] = []
        for is_text, blocks in itertools.groupby(self.content, lambda block: block.type == "text"):
            if is_text:
                texts = [block for block in blocks if isinstance(block, TextBlock)]
                told.append({"role": "user", "content": _text(texts)})
            else:
                told += [block.for_template for block in blocks if isinstance(block, ToolResultBlock)]
        return told


class AssistantMessage(Body):
    """What the model said, and which tools it called."""

    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[AssistantBlock], Tag("blocks")], Discriminator(_kind)
    ]

    @property
    def for_template(self) -> list[dict[str, Any]]:
        """As chat templates take it."""
        if isinstance(self.content, str):
            return [{"role": "assistant", "content": self.content}]
        text = _text(block for block in self.content if isinstance(block, TextBlock))
        calls = [block.for_template for block in self.content if isinstance(block, ToolUseBlock)]
        return [{"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class Tool(Block):
    """A function that the client runs."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: Mapping[str, Any]
    strict: bool | None = None

    @property
    def in_openais_shape(self) -> dict[str, Any]:
        """As `cake.tools` takes it."""
        given = {"description": self.description, "strict": self.strict}
        said = {key: value for key, value in given.items() if value is not None}
        return {"type": "function", "function": {"name": self.name, **said, "parameters": self.input_schema}}


class Free(Body):
    """The model may call tools, as many as it likes, or none."""

    type: Literal["auto", "none"]
    disable_parallel_tool_use: No | None = None

    @property
    def in_openais_shape(self) -> str:
        """As `cake.tools` takes it."""
        return self.type


class AnyTool(Body):
    """The model must call one of them."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None  # it calls one in any case

    @property
    def in_openais_shape(self) -> str:
        """As `cake.tools` takes it."""
        return "required"


class NamedTool(Body):
    """The model must call this one."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None  # it calls one in any case

    @property
    def in_openais_shape(self) -> dict[str, Any]:
        """As `cake.tools` takes it."""
        return {"type": "function", "function": {"name": self.name}}


class Thinking(Body):
    """Thinking before an answer, which no model here does."""

    type: Literal["disabled"]


class JsonFormat(Body):
    """JSON that the answer is to be."""

    type: Literal["json_schema"]
    schema_: Mapping[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """What the answer is to be."""

    format: JsonFormat | None = None


class Prompt(Body):
    """What answers and counts of tokens are made of: `POST /v1/messages/count_tokens`."""

    model: ModelName
    messages: Annotated[list[Message], Field(min_length=1, examples=[QUESTION])]
    system: Text | None = None
    tools: list[Tool] | None = None
    tool_choice: Annotated[Free | AnyTool | NamedTool, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Mapping[str, Any] | None = None  # what prompts have in common is kept in any case

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> "Prompt":
        if self.messages[-1].role == "assistant":
            raise ValueError(NO_PREFIX)
        return self

    @property
    def for_template(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them."""
        system = [] if self.system is None else [{"role": "system", "content": _text(self.system)}]
        return [*system, *(told for message in self.messages for told in message.for_template)]

    @property
    def offer(self) -> Offer:
        """The tools. Raises `CakeError` where they are not understood."""
        choice = self.tool_choice.in_openais_shape if self.tool_choice else None
        return read_offer([tool.in_openais_shape for tool in self.tools or ()], choice)


class MessagesRequest(Prompt):
    """`POST /v1/messages`."""

    max_tokens: Annotated[Natural, Field(examples=[100])]
    stream: bool = False
    stop_sequences: Stops | None = None
    temperature: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Index | None = None
    metadata: Mapping[str, Any] | None = None  # clients say who asks; it changes nothing
    service_tier: Literal["auto", "standard_only"] | None = None  # there is one

    @property
    def asked(self) -> Asked:
        """As every dialect says it."""
        wanted = self.output_config.format if self.output_config else None
        return Asked(
            max_tokens=self.max_tokens,
            stops=self.stop_sequences or (),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            schema=wanted.schema_ if wanted else None,
        )


def _text(content: str | Iterable[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
