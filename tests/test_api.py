"""A real server with two real workers and the demo model, asked by OpenAI's own client."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import openai
import pytest
import torch
from real_processes import API_KEY, GREEDY
from transformers import LlamaForCausalLM

from cake.model.tokenizer import Tokenizer

pytestmark = pytest.mark.xdist_group("api")
QUESTION = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture
def client(api_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api_url}/v1", api_key=API_KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    (only,) = client.models.list().data
    return only.id


def ask(client: openai.OpenAI, model: str, **changes: Any) -> Any:
    wanted = {"messages": QUESTION, "max_tokens": 24, "temperature": 0, **changes}
    return client.chat.completions.create(model=model, **wanted)


def test_the_model_is_listed(client: openai.OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("meta/other")


def test_a_chat_says_what_the_command_line_says(
    client: openai.OpenAI, model: str, cli: Callable[..., Any]
) -> None:
    answer = ask(client, model, messages=[{"role": "system", "content": "Be brief."}, *QUESTION])
    command = ("--prompt", "Name three colours.", "--system-prompt", "Be brief.", "-n", 24, "--json")
    told = json.loads(cli(*command, *GREEDY).stdout)
    (choice,) = answer.choices
    assert choice.message.content == told["text"]
    assert choice.message.role == "assistant"
    assert choice.finish_reason == told["finish_reason"]
    assert answer.usage.prompt_tokens == told["prompt_tokens"]
    assert answer.usage.completion_tokens == len(told["token_ids"])


def test_a_stream_brings_the_same_text_piece_by_piece(client: openai.OpenAI, model: str) -> None:
    whole = ask(client, model)
    chunks = list(ask(client, model, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(text or "" for text in texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_an_answer_ends_before_a_stop(client: openai.OpenAI, model: str) -> None:
    text = ask(client, model).choices[0].message.content
    stop = text[len(text) // 2 :][:7]
    answer = ask(client, model, stop=[stop, "never said"])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_completion_goes_on_where_the_prompt_ends(client: openai.OpenAI, model: str) -> None:
    prompt = "One, two, three, four,"
    wanted = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    plain = client.completions.create(**wanted).choices[0].text
    assert "five" in plain
    assert client.completions.create(**wanted, echo=True).choices[0].text == prompt + plain
    streamed = client.completions.create(**wanted, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == prompt + plain


def test_several_answers_share_the_computing_of_their_prompt(client: openai.OpenAI, model: str) -> None:
    long = [{"role": "user", "content": "Continue: " + "pears and apples, " * 30}]
    wanted = {"messages": long, "temperature": 1.2, "seed": 5, "max_tokens": 12}
    answer = ask(client, model, n=3, **wanted)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == ask(client, model, **wanted).choices[0].message.content
    again = [{"role": "user", "content": "Say after me: " + "plums and cherries, " * 30}]
    usage = ask(client, model, n=3, **{**wanted, "messages": again}).usage
    cached = usage.prompt_tokens_details.cached_tokens
    assert usage.completion_tokens > 12
    assert cached < 40, "it was new, and computed once"
    streamed: dict[int, str] = {}
    ends = []
    for chunk in ask(client, model, n=3, stream=True, **wanted):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
            ends += [choice.index] if choice.finish_reason else []
    assert [streamed[i] for i in range(3)] == texts
    assert sorted(ends) == [0, 1, 2]


def test_tokens_bring_their_log_probabilities(client: openai.OpenAI, model: str) -> None:
    ask(client, model, max_tokens=8)  # from now on its prompt is held, and every answer begins alike
    choice = ask(client, model, logprobs=True, top_logprobs=3, max_tokens=8).choices[0]
    tokens = choice.logprobs.content
    assert len(tokens) == 8
    for token in tokens:
        assert token.token == bytes(token.bytes).decode(errors="replace")
        assert len(token.top_logprobs) == 3
        values = [each.logprob for each in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert token.logprob == values[0], "the likeliest is taken at temperature 0"
        assert sum(map(math.exp, values)) <= 1 + 1e-6
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == choice.message.content
    streamed = ask(client, model, logprobs=True, top_logprobs=3, max_tokens=8, stream=True)
    parts = [p for chunk in streamed if (given := chunk.choices[0].logprobs) for p in given.content]
    assert parts == tokens


def test_log_probabilities_are_those_of_transformers(
    client: openai.OpenAI, model: str, demo_model: Path
) -> None:
    text = "One, two, three, four,"
    wanted = {"model": model, "prompt": text, "max_tokens": 6, "temperature": 0, "logprobs": 0}
    told = client.completions.create(**wanted).choices[0].logprobs.token_logprobs
    reference = LlamaForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    ids = Tokenizer(demo_model).encode(text)
    for logprob in told:
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert logprob == pytest.approx(float(expected.max()), abs=1e-3)
        ids.append(int(expected.argmax()))


def test_a_completions_log_probabilities_are_lists(client: openai.OpenAI, model: str) -> None:
    wanted = {"model": model, "prompt": "One, two, three, four,", "max_tokens": 6, "temperature": 0}
    choice = client.completions.create(**wanted, logprobs=2).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert all(len(top) == 2 for top in told.top_logprobs)
    assert told.token_logprobs == [max(top.values()) for top in told.top_logprobs]
    assert [choice.text[at:].startswith(t) for at, t in zip(told.text_offset, told.tokens, strict=True)]
    with pytest.raises(openai.BadRequestError, match="echo with logprobs"):
        client.completions.create(**wanted, logprobs=2, echo=True)


def test_a_bias_makes_a_token_certain_or_impossible(
    client: openai.OpenAI, model: str, demo_model: Path
) -> None:
    wanted = {"model": model, "prompt": "One, two, three, four,", "max_tokens": 3, "temperature": 0}
    usual = client.completions.create(**wanted, logprobs=0).choices[0]
    ids = Tokenizer(demo_model).encode(usual.logprobs.tokens[0], start=False)
    assert len(ids) == 1
    without = client.completions.create(**wanted, logit_bias={str(ids[0]): -100}).choices[0].text
    assert not without.startswith(usual.logprobs.tokens[0])
    always = client.completions.create(**wanted, logit_bias={str(ids[0]): 100}).choices[0].text
    assert always == 3 * usual.logprobs.tokens[0]


def test_penalties_keep_an_answer_from_repeating_itself(client: openai.OpenAI, model: str) -> None:
    wanted = {"model": model, "prompt": "apple, " * 12, "max_tokens": 24, "temperature": 0}
    plain = client.completions.create(**wanted).choices[0].text
    assert plain.count("apple") >= 8
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}):
        varied = client.completions.create(**wanted, **penalty).choices[0].text
        assert varied.count("apple") < plain.count("apple")


def test_a_prompt_may_be_its_tokens(client: openai.OpenAI, model: str, demo_model: Path) -> None:
    text = "One, two, three, four,"
    wanted = {"model": model, "max_tokens": 6, "temperature": 0, "echo": True}
    same = client.completions.create(**wanted, prompt=text).choices[0].text
    ids = Tokenizer(demo_model).encode(text)
    assert client.completions.create(**wanted, prompt=ids).choices[0].text == same
    for unknown in (49152, 10**30):
        with pytest.raises(openai.BadRequestError, match=f"prompt names the token {unknown}"):
            client.completions.create(**wanted, prompt=[*ids, unknown])
    with pytest.raises(openai.BadRequestError, match="several prompts in one request"):
        client.completions.create(**wanted, prompt=[text, text])


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI, model: str) -> None:
    texts = [ask(client, model, temperature=1.5, seed=seed).choices[0].message.content for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_an_answer_keeps_to_a_schema(client: openai.OpenAI, model: str) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "n": {"type": "integer", "maximum": 99}},
        "required": ["colour", "n"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    answer = ask(client, model, response_format=wanted, max_tokens=60).choices[0]
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.message.content), schema)
    with pytest.raises(openai.BadRequestError, match="schema"):
        ask(client, model, response_format={"type": "json_schema"})


def test_what_means_nothing_is_no_reason_to_refuse(client: openai.OpenAI, model: str) -> None:
    nothing = {"presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "logit_bias": {}, "n": 1}
    body = {"tools": None, "stop": None, "top_logprobs": None}
    assert ask(client, model, max_tokens=2, **nothing, extra_body=body).usage.completion_tokens == 2


def test_tools_are_refused_by_a_model_that_knows_none(client: openai.OpenAI, model: str) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        ask(client, model, tools=[tool])


def test_a_second_turn_is_not_computed_from_its_beginning(client: openai.OpenAI, model: str) -> None:
    long = [{"role": "user", "content": "Repeat: " + "apples and pears, " * 30}]
    answer = ask(client, model, messages=long).choices[0].message.content
    turn = [*long, {"role": "assistant", "content": answer}, *QUESTION]
    usage = ask(client, model, messages=turn).usage
    assert usage.prompt_tokens_details.cached_tokens > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 9}, "temperature"),
        ({"messages": []}, "messages"),
        ({"n": 17}, "n: "),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"presence_penalty": 2.5}, "presence_penalty: "),
        ({"logit_bias": {"49152": 1}}, "the token 49152, but the model has only 49152"),
        ({"logit_bias": {"no": 1}}, "logit_bias"),
        ({"extra_body": {"mirostat": 2}}, "mirostat is not supported"),
        ({"stop": ["a"] * 5}, "at most 4"),
        ({"stream_options": {"include_usage": True}}, "set stream"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "parts.0.type: Input should be 'text'",
        ),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "6.. tokens and the context holds 512"),
    ],
)
def test_a_bad_request_is_told_why(
    client: openai.OpenAI, model: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, model, **changes)


def test_who_does_not_know_the_key_is_turned_away(api_url: str, model: str) -> None:
    stranger = openai.OpenAI(base_url=f"{api_url}/v1", api_key="guessed", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        ask(stranger, model)
    assert httpx2.get(f"{api_url}/health").json()["model"] == model


def test_the_examples_of_the_description_are_answered(api_url: str) -> None:
    paths = httpx2.get(f"{api_url}/openapi.json").json()["paths"]
    examples = {
        path: methods["post"]["requestBody"]["content"]["application/json"]["example"]
        for path, methods in paths.items()
        if "post" in methods
    }
    assert len(examples) == 8
    for path, example in examples.items():
        answer = httpx2.post(f"{api_url}{path}", json=example, headers={"x-api-key": API_KEY}, timeout=60)
        assert answer.status_code == 200, path
        assert '"error"' not in answer.text


def test_what_is_not_there_is_said_in_openais_shape(api_url: str) -> None:
    answer = httpx2.get(f"{api_url}/v1/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "there is no /v1/nothing here"
    answer = httpx2.get(f"{api_url}/v1/chat/completions")
    assert answer.status_code == 405


def test_many_at_once_are_all_answered(client: openai.OpenAI, model: str) -> None:
    alone = {i: ask(client, model, messages=counting(i), max_tokens=6) for i in range(4)}
    with ThreadPoolExecutor(32) as clients:
        answers = list(
            clients.map(lambda i: ask(client, model, messages=counting(i % 4), max_tokens=6), range(40))
        )
    assert len(answers) == 40
    for i, answer in enumerate(answers):
        assert answer.choices[0].message.content == alone[i % 4].choices[0].message.content


def counting(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What comes after {i}?"}]


def test_a_client_that_leaves_makes_room(client: openai.OpenAI, model: str) -> None:
    """More than the server answers at once begin and leave; the next is answered all the same."""
    for _ in range(20):
        stream = ask(client, model, stream=True, max_tokens=400)
        next(iter(stream))
        stream.close()
    assert ask(client, model, max_tokens=2).usage.completion_tokens == 2


def refused(*arguments: str) -> str:
    command = [sys.executable, "-m", "cake", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    return ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key", "x"], "--api-key is for --api"),
        (["--api-origin", "*"], "--api-origin is for --api"),
        (["--api", "127.0.0.1:0", "--api-origin", "example.org"], "--api-origin example.org: write such as"),
        (["--api", "127.0.0.1:0", "--mode", "worker"], "--api is for a master"),
        (["--api", "127.0.0.1:0", "--chat"], "--api and --chat"),
        (["--api", "127.0.0.1:0", "-n", "5"], "--api and --sample-len"),
        (["--api", "nonsense"], "write host:port"),
    ],
)
def test_options_that_contradict_one_another_are_refused(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    assert message in refused(*arguments)
