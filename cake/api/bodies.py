"""What the bodies of all requests have in common. What is not supported is refused by name."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from typing_extensions import TypeAliasType

from cake.tools import NAME


def _whole(number: object) -> object:
    """JSON has one kind of numbers, so that 2.0 is an integer too."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _no_number(value: object) -> object:
    """1 equals true to Python."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("true or false, and no number")
    return value


ModelName = TypeAliasType("ModelName", str)  # by name, as only a server knows which there are
WHOLE = BeforeValidator(_whole)
Natural = Annotated[int, Field(ge=1), WHOLE]
Index = Annotated[int, Field(ge=0), WHOLE]
Yes = Annotated[Literal[True], BeforeValidator(_no_number)]
No = Annotated[Literal[False], BeforeValidator(_no_number)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[Finite, Field(ge=-2, le=2)]
# As many as no client needs, and few enough to look for.
Stop = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[Stop], Field(max_length=64)]
# Of what follows `cake.tools` knows what it may be, and how to say what is wrong.
TOOL_NAME = {"type": "string", "pattern": f"^{NAME.pattern}$"}
ToolName = Annotated[str, WithJsonSchema(TOOL_NAME)]
FUNCTION = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": TOOL_NAME,
        "parameters": {"anyOf": [{"type": "object", "description": "A JSON schema."}, {"type": "null"}]},
    },
}
Tool = Annotated[
    Mapping[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "required": ["function"],
            "properties": {"type": {"const": "function"}, "function": FUNCTION},
        }
    ),
]
Bias = Annotated[Finite, Field(ge=-100, le=100)]
MOST_LOGPROBS = 20
NO_PREFIX = "an answer that goes on from the assistant's last message is not supported"
QUESTION = [{"role": "user", "content": "Hello!"}]  # an example of messages
ANY_OBJECT: dict[str, Any] = {"type": "object"}  # as a JSON schema


class Body(BaseModel):
    """What is not named here is refused, so that nothing a client asks for is ignored in silence.

    A number is no text that says one, and neither is whether something is so.
    """

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class Scored(Body):
    """A request that may want log probabilities."""

    logprobs: bool | None = None
    """Whether each token brings its log probability."""
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = None
    """With `logprobs`: those of so many of the likeliest tokens too."""

    @model_validator(mode="after")
    def _scores_all_or_none(self) -> "Scored":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self

    @property
    def n_scored(self) -> int | None:
        """As `Asked` has it."""
        return (self.top_logprobs or 0) if self.logprobs else None
