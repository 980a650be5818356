"""Who may say what, when: a table, and the small machine that walks it.

A conversation is `new`, becomes `greeted` with the master's hello, `ready` with the worker's
welcome, and `over` with anyone's goodbye.
"""

from typing import Literal

from cake.errors import ProtocolError
from cake.protocol.messages import (
    Alive,
    Failed,
    Forget,
    Forward,
    Goodbye,
    Hello,
    Leaving,
    Link,
    Linked,
    Lost,
    Message,
    Result,
    Unlinked,
    Welcome,
)

Role = Literal["master", "worker"]
State = Literal["new", "greeted", "ready", "over"]

TABLE: dict[tuple[State, Role, type[Message]], State] = {
    ("new", "master", Hello): "greeted",
    ("new", "worker", Goodbye): "over",
    ("greeted", "worker", Welcome): "ready",
    ("greeted", "worker", Goodbye): "over",
    ("greeted", "master", Goodbye): "over",
    ("ready", "master", Alive): "ready",
    ("ready", "worker", Alive): "ready",
    ("ready", "master", Link): "ready",
    ("ready", "master", Forward): "ready",
    ("ready", "master", Forget): "ready",
    ("ready", "master", Goodbye): "over",
    ("ready", "worker", Linked): "ready",
    ("ready", "worker", Unlinked): "ready",
    ("ready", "worker", Leaving): "ready",
    ("ready", "worker", Result): "ready",
    ("ready", "worker", Lost): "ready",
    ("ready", "worker", Failed): "ready",
    ("ready", "worker", Goodbye): "over",
}


class Conversation:
    """The state of one connection, moved on by every message in either direction."""

    def __init__(self) -> None:
        self.state: State = "new"

    def said(self, speaker: Role, message: Message) -> None:
        """Move on; `ProtocolError` when that speaker may not say this now."""
        following = TABLE.get((self.state, speaker, type(message)))
        if following is None:
            raise ProtocolError(
                f"a {message.kind} message from the {speaker} is out of order "
                f"(the conversation is {self.state})"
            )
        self.state = following
