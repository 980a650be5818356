"""What Ollama's clients are sent, as types: the API's description is made from them.

Durations are nanoseconds, times are written as RFC 3339 does.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from cake.api.scores import Chosen


class OllamaError(TypedDict):
    """Every answer of another status than 200."""

    error: str


class Scored(TypedDict):
    """With log probabilities, where they are wanted."""

    logprobs: NotRequired[list[Chosen]]


class FunctionCalled(TypedDict):
    """Which function the model calls."""

    name: str
    arguments: Mapping[str, Any]


class CallMade(TypedDict):
    """A call that the client is to make."""

    id: str
    function: FunctionCalled


class AssistantSaid(TypedDict):
    """What the model answered, or the next piece of it."""

    role: Literal["assistant"]
    content: str
    tool_calls: NotRequired[list[CallMade]]


class Answered(TypedDict):
    """What all answers of models begin with."""

    model: str
    created_at: str


class More(Scored):
    """That the answer goes on."""

    done: Literal[False]


class Loaded(TypedDict):
    """That nothing was asked, and the model is there."""

    done: Literal[True]
    done_reason: Literal["load"]


class Ending(TypedDict):
    """Why the answer ended, and how long it took."""

    done: Literal[True]
    done_reason: Literal["stop", "length"]
    total_duration: int
    load_duration: Annotated[int, Field(description="The wait for a turn: the model is loaded already.")]
    prompt_eval_count: Annotated[int, Field(description="Tokens of the prompt.")]
    prompt_eval_duration: int
    eval_count: Annotated[int, Field(description="Tokens of the answer.")]
    eval_duration: int


class OfChat(Answered):
    """An answer to a chat."""

    message: AssistantSaid


class ChatPiece(OfChat, More):
    """A piece of a chat's streamed answer."""


class ChatAnswer(OfChat, Ending, Scored):
    """A chat's answer; in a stream its last line, which says no more."""


class ChatLoaded(OfChat, Loaded):
    """The answer to a chat without messages."""


class OfPrompt(Answered):
    """An answer to a prompt."""

    response: str


class GeneratePiece(OfPrompt, More):
    """A piece of a prompt's streamed answer."""


class GenerateAnswer(OfPrompt, Ending, Scored):
    """A prompt's answer; in a stream its last line, which says no more."""


class GenerateLoaded(OfPrompt, Loaded):
    """The answer to an empty prompt."""


class ModelDetails(TypedDict):
    """What kind of model it is."""

    parent_model: Literal[""]
    format: Literal["safetensors"]
    family: Literal["llama"]
    families: list[str]
    parameter_size: str
    quantization_level: str


class ModelEntry(TypedDict):
    """A model that is served."""

    name: str
    model: str
    size: Annotated[int, Field(description="Bytes.")]
    digest: str
    details: ModelDetails


class AvailableModel(ModelEntry):
    """One that can be asked."""

    modified_at: Annotated[str, Field(description="When the server began to serve it.")]


class RunningModel(ModelEntry):
    """One that is loaded."""

    expires_at: str
    context_length: int


class AvailableModels(TypedDict):
    """Those that can be asked."""

    models: list[AvailableModel]


class RunningModels(TypedDict):
    """Those that are loaded."""

    models: list[RunningModel]


ModelFigures = TypedDict(
    "ModelFigures",
    {
        "general.architecture": Literal["llama"],
        "general.basename": str,
        "general.parameter_count": int,
        "llama.attention.head_count": int,
        "llama.attention.head_count_kv": int,
        "llama.attention.layer_norm_rms_epsilon": float,
        "llama.block_count": int,
        "llama.context_length": int,
        "llama.embedding_length": int,
        "llama.feed_forward_length": int,
        "llama.rope.dimension_count": int,
        "llama.rope.freq_base": float,
        "llama.vocab_size": int,
    },
)


class ModelDescribed(TypedDict):
    """What a model is."""

    details: ModelDetails
    modified_at: Annotated[str, Field(description="When the server began to serve it.")]
    capabilities: list[Literal["completion", "tools"]]
    model_info: ModelFigures


class ApiVersion(TypedDict):
    """The version of Ollama whose API this is."""

    version: str
