"""A real server with two real workers and the demo model, asked by Anthropic's own client."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import jsonschema
import openai
import pytest
from real_processes import API_KEY, COLOUR_SCHEMA

pytestmark = pytest.mark.xdist_group("api")
QUESTION = [{"role": "user", "content": "Name three colours."}]
UNNAMED = ("temperature", "top_p", "top_k", "mcp_servers")
TOOL = {"name": "look", "input_schema": {"type": "object"}}


@pytest.fixture
def client(api_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=api_url, api_key=API_KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def model(client: anthropic.Anthropic) -> str:
    (only,) = client.models.list().data
    return only.id


def wishes(**changes: Any) -> Any:
    """What the client of today has no name for, older ones said too."""
    unnamed = {"temperature": 0} | {key: changes.pop(key) for key in UNNAMED if key in changes}
    return {"messages": QUESTION, "max_tokens": 24, "extra_body": unnamed, **changes}


def ask(client: anthropic.Anthropic, model: str, **changes: Any) -> Any:
    return client.messages.create(model=model, **wishes(**changes))


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content)


def test_the_model_is_listed_for_clients_of_both_dialects(
    client: anthropic.Anthropic, model: str, api_url: str
) -> None:
    told = client.models.retrieve(model)
    assert (told.id, told.type, told.max_input_tokens) == (model, "model", 512)
    with pytest.raises(anthropic.NotFoundError, match="is not served here"):
        client.models.retrieve("other")
    with openai.OpenAI(base_url=f"{api_url}/v1", api_key=API_KEY) as other:
        assert [each.id for each in other.models.list().data] == [model]


def test_a_message_says_what_a_chat_in_openais_dialect_says(
    client: anthropic.Anthropic, model: str, api_url: str
) -> None:
    message = ask(client, model, system="Be brief.")
    with openai.OpenAI(base_url=f"{api_url}/v1", api_key=API_KEY) as other:
        wanted: Any = {"model": model, "temperature": 0, "max_tokens": 24}
        messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
        told = other.chat.completions.create(messages=messages, **wanted)
    assert text_of(message) == told.choices[0].message.content
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == told.usage.prompt_tokens
    assert usage.output_tokens == told.usage.completion_tokens


def test_a_stream_brings_the_same_text_piece_by_piece(client: anthropic.Anthropic, model: str) -> None:
    whole = ask(client, model)
    with client.messages.stream(model=model, **wishes()) as stream:
        pieces = list(stream.text_stream)
        message = stream.get_final_message()
    assert "".join(pieces) == text_of(message) == text_of(whole)
    assert len(pieces) > 5
    assert message.stop_reason == whole.stop_reason
    assert message.usage.output_tokens == whole.usage.output_tokens
    seen = (message.usage.input_tokens or 0) + (message.usage.cache_read_input_tokens or 0)
    assert seen == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_events_come_in_their_order(client: anthropic.Anthropic, model: str) -> None:
    kinds = [event.type for event in ask(client, model, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_blocks_of_text_are_text(client: anthropic.Anthropic, model: str) -> None:
    whole = ask(client, model, system="Be brief.\nBe kind.")
    kept = {"type": "ephemeral"}
    system = [
        {"type": "text", "text": "Be brief.", "cache_control": kept},
        {"type": "text", "text": "Be kind."},
    ]
    messages = [{"role": "user", "content": [{"type": "text", "text": "Name three colours."}]}]
    assert text_of(ask(client, model, system=system, messages=messages)) == text_of(whole)
    turn = [*QUESTION, {"role": "assistant", "content": whole.content}, *QUESTION]
    assert ask(client, model, messages=turn, max_tokens=2).usage.output_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_that_ended_an_answer_is_named(
    client: anthropic.Anthropic, model: str, stream: bool
) -> None:
    text = text_of(ask(client, model))
    stop = text[len(text) // 2 :][:7]
    wanted = wishes(stop_sequences=["never said", stop])
    if stream:
        with client.messages.stream(model=model, **wanted) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(model=model, **wanted)
    assert text_of(message) == text[: text.index(stop)]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


def test_an_answer_that_fills_the_context_says_so(client: anthropic.Anthropic, model: str) -> None:
    long = [{"role": "user", "content": "Go on: " + "apple, " * 160}]
    message = ask(client, model, messages=long, max_tokens=4096, stop_sequences=["\x00"])
    assert message.stop_reason in ("model_context_window_exceeded", "end_turn")
    if message.stop_reason != "end_turn":
        usage = message.usage
        assert usage.input_tokens + usage.cache_read_input_tokens + usage.output_tokens == 512


def test_tokens_are_counted(client: anthropic.Anthropic, model: str) -> None:
    usage = ask(client, model, system="Be brief.", max_tokens=1).usage
    counted = client.messages.count_tokens(model=model, system="Be brief.", messages=QUESTION)  # type: ignore[arg-type]
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    long = [{"role": "user", "content": "word " * 600}]
    assert client.messages.count_tokens(model=model, messages=long).input_tokens > 600  # type: ignore[arg-type]


def test_a_second_turn_is_read_from_the_cache(client: anthropic.Anthropic, model: str) -> None:
    long = [{"role": "user", "content": "Recite: " + "apples and plums, " * 30}]
    answer = text_of(ask(client, model, messages=long))
    turn = [*long, {"role": "assistant", "content": answer}, *QUESTION]
    usage = ask(client, model, messages=turn).usage
    assert usage.cache_read_input_tokens > 100
    assert usage.input_tokens < 100


def test_an_answer_keeps_to_a_schema(client: anthropic.Anthropic, model: str) -> None:
    wanted = {"format": {"type": "json_schema", "schema": COLOUR_SCHEMA}}
    message = ask(client, model, output_config=wanted, max_tokens=60)
    assert message.stop_reason == "end_turn"
    jsonschema.validate(json.loads(text_of(message)), COLOUR_SCHEMA)


def test_what_changes_nothing_is_taken(client: anthropic.Anthropic, model: str) -> None:
    nothing: dict[str, Any] = {
        "metadata": {"user_id": "me"},
        "thinking": {"type": "disabled"},
        "service_tier": "auto",
        "top_k": 40,
        "top_p": 0.9,
    }
    assert ask(client, model, max_tokens=2, **nothing).usage.output_tokens == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1.5}, "temperature: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        ({"tools": [TOOL]}, "knows no tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type: "),
        ({"mcp_servers": []}, "mcp_servers is not supported"),
        ({"output_config": {"effort": "low"}}, "output_config.effort is not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type: "),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image' found using 'type'"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "Red,"}]}, "goes on from the assistant's"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "6.. tokens and the context holds 512"),
        ({"stop_sequences": [""]}, "stop_sequences.0: "),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_told_why(
    client: anthropic.Anthropic, model: str, changes: dict[str, Any], message: str, stream: bool
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=message) as told:
        ask(client, model, stream=stream, **changes)
    body: Any = told.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")


def test_a_request_must_say_how_long_the_answer_may_be(api_url: str, model: str) -> None:
    body = {"model": model, "messages": QUESTION}
    answer = httpx2.post(f"{api_url}/v1/messages", json=body, headers={"x-api-key": API_KEY})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "max_tokens: Field required")


def test_the_key_comes_in_either_header(api_url: str, model: str) -> None:
    with anthropic.Anthropic(base_url=api_url, auth_token=API_KEY, max_retries=0) as bearer:
        assert ask(bearer, model, max_tokens=2).usage.output_tokens == 2
    stranger = anthropic.Anthropic(base_url=api_url, api_key="guessed", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError) as told:
        ask(stranger, model)
    body: Any = told.value.body
    assert body["error"]["type"] == "authentication_error"


def test_what_is_not_there_is_said_in_anthropics_shape(client: anthropic.Anthropic, model: str) -> None:
    with pytest.raises(anthropic.NotFoundError, match="is not served here") as told:
        ask(client, "claude")
    assert isinstance(told.value.body, dict)
    with pytest.raises(anthropic.NotFoundError, match="there is no /v1/messages/batches here") as told:
        client.messages.batches.list()
    assert told.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


def test_a_client_that_leaves_makes_room(client: anthropic.Anthropic, model: str) -> None:
    for _ in range(20):
        stream = ask(client, model, stream=True, max_tokens=400)
        next(iter(stream))
        stream.close()
    assert ask(client, model, max_tokens=2).usage.output_tokens == 2
