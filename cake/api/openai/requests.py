"""What clients send: the bodies of OpenAI's requests, checked. What is not supported is refused by name.

Knows nothing of HTTP, and of models nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, WithJsonSchema, field_validator, model_validator

from cake.api.bodies import (
    ANY_OBJECT,
    MOST_LOGPROBS,
    QUESTION,
    WHOLE,
    Bias,
    Body,
    Finite,
    Index,
    ModelName,
    Natural,
    Penalty,
    Scored,
    Stop,
    Tool,
    Yes,
)
from cake.api.task import Asked
from cake.tools import Offer, read_offer

MOST_STOPS = 4
MOST_CHOICES = 16
Biases = Annotated[
    Mapping[Annotated[int, Field(ge=0)], Bias],
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]
NAMED = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
ToolChoice = Annotated[
    str | Mapping[str, Any],
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required"]},
                {"type": "object", "required": ["function"], "properties": {"function": NAMED}},
            ]
        }
    ),
]
CALLED = {
    **NAMED,
    "properties": {
        "name": {"type": "string"},
        "arguments": {"anyOf": [{"type": kind} for kind in ("string", "object", "null")]},
    },
}
Called = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "required": ["function"], "properties": {"function": CALLED}}),
]
Prompt = str | Annotated[list[Index], Field(min_length=1)]


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool = False
    """Whether a last event counts the tokens."""


class Sampled(Body):
    """What requests of both kinds can ask for."""

    model: ModelName
    """The model that `/v1/models` lists."""
    stream: bool = False
    """Whether the answer comes piece by piece, as server-sent events."""
    stream_options: StreamOptions | None = None
    """For streamed answers only."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    """Texts before which the answer ends."""
    max_tokens: Natural | None = None
    """How long the answer may become; what fits the context, unless this says less."""
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    """Higher is more surprising; 0 always takes the likeliest token."""
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    """Choose among the likeliest tokens that together have this probability."""
    top_k: Index | None = None
    """Choose among so many of the likeliest tokens; 0 for all."""
    seed: Annotated[int, Field(ge=0, lt=2**63), WHOLE] | None = None
    """The same seed gives the same text; on a GPU but for rounding."""
    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=100)] | None = None
    """Above 1 makes tokens less likely that came recently."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] | None = None
    """How many answers are wanted."""
    user: str | None = None
    """Who asks, as clients may say; it changes nothing."""
    presence_penalty: Penalty | None = None
    """Makes tokens less likely that the answer has already."""
    frequency_penalty: Penalty | None = None
    """The same, as often as it has them."""
    logit_bias: Biases | None = None
    """Token ids, and how much likelier they are made; 100 makes one certain, -100 impossible."""

    @property
    def asked(self) -> Asked:
        """As every dialect says it."""
        return Asked(
            max_tokens=self.max_tokens,
            stops=[self.stop] if isinstance(self.stop, str) else self.stop or (),
            n=self.n or 1,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            repeat_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
        )

    @field_validator("stop", mode="before")
    @classmethod
    def _few_and_not_empty(cls, stop: object) -> object:
        stops = stop if isinstance(stop, list) else [stop]
        if len(stops) > MOST_STOPS or "" in stops:
            raise ValueError(f"at most {MOST_STOPS} texts, none of them empty")
        return stop


class TextPart(Body):
    """A part of a message; pictures and sound are refused."""

    type: Literal["text"]
    text: str


def _kind(content: object) -> str:
    return "nothing" if content is None else "text" if isinstance(content, str) else "parts"


Content = Annotated[  # tagged, so that what is wrong with a part is said, and not that it is no text
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("parts")] | Annotated[None, Tag("nothing")],
    Discriminator(_kind),
]


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks; a developer's words are a system's."""
    content: Content = None
    """What is said."""
    name: str | None = None
    """The speaker's name, for models whose chat template knows names."""
    refusal: None = None
    tool_calls: list[Called] | None = None
    """The calls of an earlier answer, as they came."""
    tool_call_id: str | None = None
    """Which call this is the result of."""

    @property
    def for_template(self) -> dict[str, Any]:
        """As chat templates take it; a developer's words are a system's."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or ())
        told: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        given = {"name": self.name, "tool_calls": self.tool_calls, "tool_call_id": self.tool_call_id}
        return told | {key: value for key, value in given.items() if value}


class Schema(Body):
    """A JSON schema that the answer keeps to."""

    name: str
    description: str | None = None
    """For people; the model is not told."""
    schema_: Mapping[str, Any] = Field(default_factory=dict, alias="schema")
    """The schema itself."""
    strict: bool | None = None
    """It is kept to in any case."""


class ResponseFormat(Body):
    """What the answer is to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _with_a_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("the type json_schema needs a json_schema")
        return self

    @property
    def wanted(self) -> Mapping[str, Any] | None:
        """The schema, if JSON is wanted."""
        if self.json_schema is not None and self.type == "json_schema":
            return self.json_schema.schema_
        return ANY_OBJECT if self.type == "json_object" else None


class ChatRequest(Sampled, Scored):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, examples=[QUESTION])]
    """The conversation so far, oldest first."""
    max_completion_tokens: Natural | None = None
    """The same as `max_tokens`, by its newer name."""
    response_format: ResponseFormat | None = None
    """What the answer is held to."""
    tools: Sequence[Tool] | None = None
    """Functions that the model may call, in OpenAI's form, of which the client runs them."""
    tool_choice: ToolChoice | None = None
    """`none`, `auto`, `required`, or the one function that must be called."""
    parallel_tool_calls: Yes | None = None
    """The model decides."""

    @property
    def asked(self) -> Asked:
        """As every dialect says it."""
        limit = self.max_completion_tokens or self.max_tokens
        wanted = self.response_format.wanted if self.response_format else None
        return replace(super().asked, max_tokens=limit, n_scored=self.n_scored, schema=wanted)

    @property
    def offer(self) -> Offer:
        """The tools. Raises `CakeError` where they are not understood."""
        return read_offer(self.tools or (), self.tool_choice)


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: Annotated[Prompt, Field(examples=["One, two, three,"])]
    """The text that goes on, or its token ids."""
    echo: bool = False
    """Whether the answer begins with the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = None
    """Each token brings its log probability, and those of so many of the likeliest."""

    @field_validator("prompt", mode="before")
    @classmethod
    def _only_one(cls, prompt: object) -> object:
        if isinstance(prompt, list) and any(not isinstance(token, int | float) for token in prompt):
            raise ValueError(
                "a text, or a list of token ids; several prompts in one request are not supported"
            )
        return prompt

    @model_validator(mode="after")
    def _scores_its_own(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: the prompt's tokens have none")
        return self

    @property
    def asked(self) -> Asked:
        """As every dialect says it."""
        return replace(super().asked, max_tokens=self.max_tokens or 16, n_scored=self.logprobs)
