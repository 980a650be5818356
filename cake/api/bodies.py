"""What the bodies of all requests have in common. What is not supported is refused by name."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from typing_extensions import TypeAliasType


def _whole(number: object) -> object:
    """JSON has one kind of numbers, so that 2.0 is an integer too."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


ModelName = TypeAliasType("ModelName", str)  # by name, as only a server knows which there are
WHOLE = BeforeValidator(_whole)
Natural = Annotated[int, Field(ge=1), WHOLE]
Index = Annotated[int, Field(ge=0), WHOLE]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[Finite, Field(ge=-2, le=2)]
# As many as no client needs, and few enough to look for.
Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)]
Bias = Annotated[Finite, Field(ge=-100, le=100)]
NO_PREFIX = "an answer that goes on from the assistant's last message is not supported"
ANY_OBJECT: dict[str, Any] = {"type": "object"}  # as a JSON schema


class Body(BaseModel):
    """What is not named here is refused, so that nothing a client asks for is ignored in silence."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
