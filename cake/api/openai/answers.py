"""What OpenAI's clients are sent, as types: the API's description is made from them."""

from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema
from typing_extensions import NotRequired, TypedDict

from cake.api.bodies import ModelName
from cake.api.scores import Chosen

REASONS = {"type": "string", "enum": ["stop", "length", "tool_calls"]}
Ended = Annotated[str | None, WithJsonSchema(REASONS)]
MayHaveEnded = Annotated[str | None, WithJsonSchema({"anyOf": [REASONS, {"type": "null"}]})]


class CachedTokens(TypedDict):
    """Of a prompt."""

    cached_tokens: Annotated[int, Field(description="That an earlier request had in common.")]


class Usage(TypedDict):
    """Tokens, as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: Annotated[int, Field(description="Of all answers together.")]
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatLogprobs(TypedDict):
    """Of every token."""

    content: list[Chosen]
    refusal: None


class CalledFunction(TypedDict):
    """Which function the model calls."""

    name: str
    arguments: Annotated[str, Field(description="A JSON object as text.")]


class ToolCall(TypedDict):
    """A call that the client is to make."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class StreamedToolCall(ToolCall):
    """The same in a stream; it comes whole."""

    index: int


class Said(TypedDict):
    """What the model answered."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """One of the answers."""

    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: Ended


class Common(TypedDict):
    """What all answers of models begin with."""

    id: str
    created: Annotated[int, Field(description="Seconds since 1970.")]
    model: ModelName


class ChatCompletion(Common):
    """A chat's answer."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(TypedDict):
    """What is new."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[StreamedToolCall]]


class ChatChunkChoice(TypedDict):
    """What one of the answers goes on with."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: MayHaveEnded


class ChatChunk(Common):
    """A piece of a chat's streamed answer; the stream ends with `[DONE]`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class LastChatChunk(ChatChunk):
    """The last piece, of no answer, where usage is wanted."""

    usage: Usage


class CompletionLogprobs(TypedDict):
    """Four lists, an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One of the answers, or what it goes on with."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: MayHaveEnded


class Completion(Common):
    """How a prompt goes on."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Common):
    """A piece of it; the stream ends with `[DONE]`, and before that with a `Completion` of no choices where
    usage is wanted.
    """

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ModelCard(TypedDict):
    """A model that is served."""

    id: ModelName
    object: Literal["model"]
    created: Annotated[int, Field(description="Seconds since 1970.")]
    owned_by: Literal["cake"]


class ModelList(TypedDict):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]
