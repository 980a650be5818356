"""What clients send: the bodies of OpenAI's requests, checked. What is not supported is refused by name.

Knows nothing of HTTP, and of models nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cake.api.bodies import ANY_OBJECT, Bias, Body, Finite, Penalty
from cake.api.task import Asked
from cake.tools import Offer, read_offer

MOST_STOPS = 4
MOST_CHOICES = 16
MOST_LOGPROBS = 20


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool = False


class Sampled(Body):
    """What requests of both kinds can ask for."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=100)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    user: str | None = None  # clients say who asks; it changes nothing
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Mapping[Annotated[int, Field(ge=0)], Bias] | None = None

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

    @field_validator("stop")
    @classmethod
    def _few_and_not_empty(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MOST_STOPS or "" in stops:
            raise ValueError(f"at most {MOST_STOPS} texts, none of them empty")
        return stop


class TextPart(Body):
    """A part of a message; pictures and sound are refused."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

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
    schema_: Mapping[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None  # it is kept to in any case


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


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: Literal[True] | None = None  # the model decides
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _scores_all_or_none(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self

    @property
    def asked(self) -> Asked:
        """As every dialect says it."""
        n_scored = (self.top_logprobs or 0) if self.logprobs else None
        limit = self.max_completion_tokens or self.max_tokens
        wanted = self.response_format.wanted if self.response_format else None
        return replace(super().asked, max_tokens=limit, n_scored=n_scored, schema=wanted)

    @property
    def offer(self) -> Offer:
        """The tools. Raises `CakeError` where they are not understood."""
        return read_offer(self.tools or (), self.tool_choice)


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]  # or its tokens
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _only_one(cls, prompt: object) -> object:
        if isinstance(prompt, list) and any(not isinstance(token, int) for token in prompt):
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
