"""What Anthropic's clients are sent, as types: the API's description is made from them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from cake.api.bodies import ModelName

StopReason = Literal["end_turn", "max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use"]


class AnthropicFault(TypedDict):
    """What was wrong."""

    type: str
    message: str


class AnthropicError(TypedDict):
    """Every answer of another status than 200, and a stream's last event after an error."""

    type: Literal["error"]
    error: AnthropicFault


class TextSaid(TypedDict):
    """Text of the model."""

    type: Literal["text"]
    text: str
    citations: None


class ToolUsed(TypedDict):
    """A call that the client is to make."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Mapping[str, Any]


BlockSaid = TextSaid | ToolUsed


class TokensCounted(TypedDict):
    """How many tokens a chat has."""

    input_tokens: int


class TokensUsed(TypedDict):
    """Tokens, as Anthropic counts them. Which were held is not known yet when a stream begins."""

    input_tokens: Annotated[int, Field(description="Of the prompt, without those that a session held.")]
    cache_creation_input_tokens: NotRequired[Literal[0]]
    cache_read_input_tokens: NotRequired[
        Annotated[int, Field(description="Of the prompt, which a session held.")]
    ]
    output_tokens: int


class MessageEnding(TypedDict):
    """Why the answer ended; nothing while it has not."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageSaid(MessageEnding):
    """A chat's answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: ModelName
    content: list[BlockSaid]
    usage: TokensUsed


class MessageStart(TypedDict):
    """The message, still empty."""

    type: Literal["message_start"]
    message: MessageSaid


class BlockStart(TypedDict):
    """A block, still empty."""

    type: Literal["content_block_start"]
    index: int
    content_block: BlockSaid


class TextDelta(TypedDict):
    """More of a text."""

    type: Literal["text_delta"]
    text: str


class InputDelta(TypedDict):
    """What a call is given; it comes whole."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(TypedDict):
    """What is new in a block."""

    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | InputDelta


class BlockStop(TypedDict):
    """That a block is whole."""

    type: Literal["content_block_stop"]
    index: int


class MessageDelta(TypedDict):
    """Why the answer ended, and the tokens as they have come out."""

    type: Literal["message_delta"]
    delta: MessageEnding
    usage: TokensUsed


class MessageStop(TypedDict):
    """That the message is whole."""

    type: Literal["message_stop"]


MessageEvent = (
    MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | AnthropicError
)


class ModelShown(TypedDict):
    """A model that is served."""

    type: Literal["model"]
    id: ModelName
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int
    max_tokens: int


class ModelsShown(TypedDict):
    """The models that are served."""

    data: list[ModelShown]
    has_more: Literal[False]
    first_id: ModelName
    last_id: ModelName
