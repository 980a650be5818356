"""States: who may say what, when; the whole table, written out."""

import itertools

import pytest
from test_messages import EXAMPLES

from cake.errors import ProtocolError
from cake.protocol.messages import Goodbye, Message
from cake.protocol.states import Conversation, Role, State

SAMPLES = {message.kind: message for message in EXAMPLES}

ALLOWED: dict[tuple[str, str, str], str] = {
    ("new", "master", "hello"): "greeted",
    ("new", "worker", "goodbye"): "over",
    ("greeted", "worker", "welcome"): "ready",
    ("greeted", "worker", "goodbye"): "over",
    ("greeted", "master", "goodbye"): "over",
    ("ready", "master", "alive"): "ready",
    ("ready", "worker", "alive"): "ready",
    ("ready", "worker", "unlinked"): "ready",
    ("ready", "master", "link"): "ready",
    ("ready", "master", "forward"): "ready",
    ("ready", "master", "forget"): "ready",
    ("ready", "master", "goodbye"): "over",
    ("ready", "worker", "linked"): "ready",
    ("ready", "worker", "leaving"): "ready",
    ("ready", "worker", "result"): "ready",
    ("ready", "worker", "lost"): "ready",
    ("ready", "worker", "failed"): "ready",
    ("ready", "worker", "goodbye"): "over",
}
WAY_TO: dict[State, list[tuple[Role, Message]]] = {
    "new": [],
    "greeted": [("master", SAMPLES["hello"])],
    "ready": [("master", SAMPLES["hello"]), ("worker", SAMPLES["welcome"])],
    "over": [("worker", Goodbye("enough"))],
}
ROLES: list[Role] = ["master", "worker"]


def conversation_in(state: State) -> Conversation:
    conversation = Conversation()
    for speaker, message in WAY_TO[state]:
        conversation.said(speaker, message)
    assert conversation.state == state
    return conversation


@pytest.mark.parametrize(("state", "speaker", "kind"), list(itertools.product(WAY_TO, ROLES, SAMPLES)))
def test_every_message_in_every_state(state: State, speaker: Role, kind: str) -> None:
    conversation = conversation_in(state)
    following = ALLOWED.get((state, speaker, kind))
    if following is None:
        with pytest.raises(
            ProtocolError, match=f"a {kind} message from the {speaker} is out of order.*{state}"
        ):
            conversation.said(speaker, SAMPLES[kind])
        assert conversation.state == state
    else:
        conversation.said(speaker, SAMPLES[kind])
        assert conversation.state == following


def test_the_table_here_speaks_of_all_kinds() -> None:
    assert {kind for _, _, kind in ALLOWED} == SAMPLES.keys()
    assert len(SAMPLES) == 13
