"""A real server with two real workers and the demo model, asked by Ollama's own client."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import jsonschema
import ollama
import openai
import pytest
from real_processes import API_KEY, COLOUR_SCHEMA

pytestmark = pytest.mark.xdist_group("api")
QUESTION = [{"role": "user", "content": "Name three colours."}]
BEARER = {"Authorization": f"Bearer {API_KEY}"}
GREEDY = {"temperature": 0, "num_predict": 24}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture
def client(api_url: str) -> Iterator[ollama.Client]:
    with ollama.Client(api_url, headers=BEARER, timeout=60) as client:
        yield client


@pytest.fixture
def model(client: ollama.Client) -> str:
    (only,) = client.list().models
    assert only.model is not None
    return only.model


def ask(client: ollama.Client, model: str, options: Any = None, **changes: Any) -> Any:
    return client.chat(model, **{"messages": QUESTION, "options": {**GREEDY, **(options or {})}, **changes})


def test_the_model_is_listed_described_and_there(client: ollama.Client, model: str) -> None:
    (listed,), (running,) = client.list().models, client.ps().models
    assert listed.details is not None
    assert (listed.details.family, listed.details.parameter_size) == ("llama", "134.5M")
    assert listed.size is not None
    assert listed.size > 100e6
    assert len(listed.digest or "") == 64
    assert (running.model, running.context_length) == (model, 512)
    shown = client.show(model.removesuffix(":latest"))
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 512
    assert shown.modelinfo["llama.block_count"] == 30
    assert shown.capabilities == ["completion"]


def test_a_chat_says_what_it_says_in_openais_dialect(client: ollama.Client, model: str, api_url: str) -> None:
    answer = ask(client, model)
    with openai.OpenAI(base_url=f"{api_url}/v1", api_key=API_KEY) as other:
        name = model.removesuffix(":latest")
        wanted: Any = {"model": name, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
        told = other.chat.completions.create(**wanted)
    assert answer.message.content == told.choices[0].message.content
    assert answer.message.role == "assistant"
    assert answer.done
    assert answer.done_reason == told.choices[0].finish_reason
    assert answer.prompt_eval_count == told.usage.prompt_tokens
    assert answer.eval_count == told.usage.completion_tokens


def test_a_stream_brings_the_same_text_piece_by_piece(client: ollama.Client, model: str) -> None:
    whole = ask(client, model)
    lines = list(ask(client, model, stream=True))
    assert "".join(line.message.content for line in lines) == whole.message.content
    assert len(lines) > 5
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1].eval_count == whole.eval_count


@pytest.mark.parametrize("stream", [False, True])
def test_the_parts_of_an_answers_duration_fit_into_the_whole(
    client: ollama.Client, model: str, stream: bool
) -> None:
    answer = ask(client, model, stream=stream)
    last = list(answer)[-1] if stream else answer
    parts = (last.load_duration, last.prompt_eval_duration, last.eval_duration)
    assert all(isinstance(part, int) and part > 0 for part in parts)
    assert sum(parts) <= last.total_duration


def test_lines_of_json_are_the_default(api_url: str, model: str) -> None:
    body = {"model": model, "prompt": "Name three colours.", "options": GREEDY}
    answer = httpx2.post(f"{api_url}/api/generate", json=body, headers=BEARER, timeout=60)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert len(lines) > 5
    assert {line["model"] for line in lines} == {model}
    whole = httpx2.post(f"{api_url}/api/generate", json={**body, "stream": False}, headers=BEARER, timeout=60)
    assert whole.json()["response"] == "".join(line["response"] for line in lines)


def test_a_prompt_is_a_chat_unless_it_is_raw(client: ollama.Client, model: str) -> None:
    text = "Name three colours."
    options = {**GREEDY, "repeat_penalty": 1}
    told = client.generate(model, text, system="Be brief.", options=options)
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert told.response == ask(client, model, options, messages=messages).message.content
    assert told.done_reason == "stop"
    raw = client.generate(model, "One, two, three, four,", raw=True, options=options)
    assert "five" in (raw.response or "")
    with pytest.raises(ollama.ResponseError, match="system needs the model's chat template"):
        client.generate(model, text, raw=True, system="Be brief.")


def test_an_answer_ends_before_a_stop(client: ollama.Client, model: str) -> None:
    text = ask(client, model).message.content
    stop = text[len(text) // 2 :][:7]
    answer = ask(client, model, {"stop": [stop, "never said"]})
    assert answer.message.content == text[: text.index(stop)]
    assert answer.done_reason == "stop"


def test_a_seed_and_penalties_are_heeded(client: ollama.Client, model: str) -> None:
    hot = {"temperature": 1.5, "top_p": 0.9, "top_k": 50}
    texts = [ask(client, model, {**hot, "seed": seed}).message.content for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    options = {**GREEDY, "repeat_penalty": 1}
    plain = client.generate(model, "apple, " * 12, raw=True, options=options).response or ""
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repeat_penalty": 3}):
        varied = client.generate(model, "apple, " * 12, raw=True, options={**options, **penalty}).response
        assert (varied or "").count("apple") < plain.count("apple")


def faults_of(text: str) -> list[Any]:
    """Where an answer does not keep to the schema."""
    return list(jsonschema.Draft202012Validator(COLOUR_SCHEMA).iter_errors(json.loads(text)))


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_keeps_to_a_schema(client: ollama.Client, model: str, stream: bool) -> None:
    answer = ask(client, model, {"num_predict": 60}, format=COLOUR_SCHEMA, stream=stream)
    text = "".join(part.message.content for part in answer) if stream else answer.message.content
    assert not faults_of(text)
    told = client.generate(model, "Describe a colour.", format=COLOUR_SCHEMA, options={"num_predict": 60})
    assert not faults_of(told.response or "")


def test_json_without_a_schema_is_an_object(client: ollama.Client, model: str) -> None:
    answer = ask(client, model, {"num_predict": 60}, format="json")
    assert answer.message.content.lstrip().startswith("{")


def test_tokens_bring_their_log_probabilities(client: ollama.Client, model: str) -> None:
    answer = ask(client, model, {"num_predict": 5}, logprobs=True, top_logprobs=2)
    assert "".join(each.token for each in answer.logprobs) == answer.message.content
    assert all(each.logprob == each.top_logprobs[0].logprob for each in answer.logprobs)
    lines = ask(client, model, {"num_predict": 5}, logprobs=True, stream=True)
    assert len([each for line in lines for each in line.logprobs or ()]) == 5


def test_what_changes_nothing_is_taken(client: ollama.Client, model: str) -> None:
    nothing: dict[str, Any] = {"keep_alive": "5m", "think": False, "format": ""}
    assert ask(client, model, {"num_ctx": 512, "num_predict": 2}, **nothing).eval_count == 2
    empty: dict[str, Any] = {"suffix": "", "template": "", "system": "", "images": []}
    assert client.generate(model, "Hello", options={"num_predict": 2}, **empty).eval_count == 2
    for keep_alive in (0, "5m"):
        assert client.generate(model, keep_alive=keep_alive).done_reason == "load"
    assert client.chat(model).done_reason == "load"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"num_ctx": 4096}}, "num_ctx is 4096, .* here holds 512 tokens"),
        ({"options": {"mirostat": 2}}, "options.mirostat is not supported"),
        ({"options": {"top_p": 9}}, "options.top_p: "),
        ({"options": {"stop": ["a", ""]}}, "options.stop.1: "),
        ({"think": True}, "think: "),
        ({"tools": [TOOL]}, "knows no tools"),
        ({"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]}, "images is not supported"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "6.. tokens and the context holds 512"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "Red,"}]}, "goes on from the assistant's"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_told_why(
    client: ollama.Client, model: str, changes: dict[str, Any], message: str, stream: bool
) -> None:
    with pytest.raises(ollama.ResponseError, match=message) as told:
        list(client.chat(model, **{"messages": QUESTION, "stream": stream, **changes}))
    assert told.value.status_code == 400


def test_a_format_that_is_not_known_is_refused(api_url: str, model: str) -> None:
    body = {"model": model, "prompt": "Hello", "format": "xml"}
    answer = httpx2.post(f"{api_url}/api/generate", json=body, headers=BEARER)
    assert (answer.status_code, answer.json()) == (
        400,
        {"error": "format: json, or a JSON schema"},
    )


@pytest.mark.parametrize("field", ["suffix", "template", "images", "context"])
def test_what_generate_cannot_do_is_refused_by_name(api_url: str, model: str, field: str) -> None:
    body = {"model": model, "prompt": "Hello", field: ["x"]}
    answer = httpx2.post(f"{api_url}/api/generate", json=body, headers=BEARER)
    assert (answer.status_code, answer.json()) == (400, {"error": f"{field} is not supported"})


def test_other_models_and_strangers_are_turned_away(client: ollama.Client, model: str, api_url: str) -> None:
    with pytest.raises(ollama.ResponseError, match="'other' is not served here") as told:
        ask(client, "other:latest")
    assert told.value.status_code == 404
    with ollama.Client(api_url) as stranger, pytest.raises(ollama.ResponseError, match="API key") as told:
        ask(stranger, model)
    assert told.value.status_code == 401


def test_what_is_not_there_is_said_in_ollamas_shape(client: ollama.Client, api_url: str) -> None:
    with pytest.raises(ollama.ResponseError, match="there is no /api/pull here") as told:
        client.pull("llama3")
    assert told.value.status_code == 404
    answer = httpx2.get(f"{api_url}/api/chat", headers=BEARER)
    assert (answer.status_code, answer.json()) == (405, {"error": "GET is not for /api/chat"})


def test_clients_that_look_whether_somebody_is_there_find_the_page(api_url: str) -> None:
    assert httpx2.head(api_url).status_code == 200
    assert httpx2.get(api_url).headers["content-type"].startswith("text/html")
    assert httpx2.head(f"{api_url}/api/tags", headers=BEARER).status_code == 200
    version = httpx2.get(f"{api_url}/api/version", headers=BEARER).json()["version"]
    assert [int(part) for part in version.split(".")] >= [0, 6, 4], "what clients ask for who call tools"


def test_a_client_that_leaves_makes_room(client: ollama.Client, model: str) -> None:
    for _ in range(20):
        stream = ask(client, model, {"num_predict": 400}, stream=True)
        next(iter(stream))
        stream.close()
    assert ask(client, model, {"num_predict": 2}).eval_count == 2
