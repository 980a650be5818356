"""What clients of every dialect may be sent, as types: errors in OpenAI's shape, and how the server is.

The API's description is made from them, and whoever builds an answer is held to them by mypy.
"""

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from cake.api.bodies import ModelName
from cake.snapshot import Condition

Kind = Literal["invalid_request_error", "server_error"]


class Fault(TypedDict):
    """What was wrong."""

    message: Annotated[str, Field(description="For people.")]
    type: Kind
    param: None
    code: Annotated[str | None, Field(description="For programs, where there is one.")]


class ErrorAnswer(TypedDict):
    """Every answer of another status than 200."""

    error: Fault


class Alive(TypedDict):
    """That somebody answers."""

    live: Literal[True]


class Health(Alive):
    """Whether requests can be answered; "degraded" where a node is lost, but others serve its blocks."""

    status: Condition
    ready: bool
    model: ModelName
