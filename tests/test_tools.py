"""What a model is told of tools, and what it is held to."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pipeline_over
from drawn_answers import STOP, draw, json_odds
from jsonschema import Draft202012Validator
from tool_template import with_tools

from cake.errors import CakeError, GrammarError
from cake.generator import Generator
from cake.model.grammar import Grammars
from cake.model.sampling import SamplingParams
from cake.model.tokenizer import Tokenizer
from cake.tool_calls import Call, CallReader
from cake.tools import Offer, read_offer, template_messages

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a town",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "maxLength": 20},
                "when": {"$ref": "#/$defs/when"},
            },
            "required": ["town", "when"],
            "additionalProperties": False,
            "$defs": {"when": {"enum": ["today", "tomorrow"]}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
SCHEMAS = {"weather": WEATHER["function"]["parameters"], "now": {"maxProperties": 0}}  # type: ignore[index]
QUESTION = {"role": "user", "content": "What is the weather in Rome tomorrow?"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"town": "Rome", "when": "today"}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


@pytest.fixture(scope="module")
def tooled(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a template that knows tools."""
    return with_tools(demo_model, tmp_path_factory.mktemp("tooled"))


@pytest.fixture(scope="module")
def tokenizer(tooled: Path) -> Tokenizer:
    return Tokenizer(tooled)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, {STOP})


def test_the_template_shows_tools_calls_and_results(tokenizer: Tokenizer) -> None:
    offer = read_offer([WEATHER, NOW], "auto")
    messages = template_messages([QUESTION, CALLED, RESULT])
    text = tokenizer.decode(tokenizer.encode_chat(messages, offer.for_template))
    assert json.dumps(WEATHER) in text
    assert json.dumps(NOW) in text
    assert 'assistant\n{"name": "weather", "parameters": {"town": "Rome", "when": "today"}}' in text
    assert "ipython\nsunny" in text
    assert text.endswith("assistant\n")


def test_a_template_that_knows_no_tools_refuses_them(demo_model: Path, tokenizer: Tokenizer) -> None:
    plain = Tokenizer(demo_model)
    assert not plain.knows_tools
    assert tokenizer.knows_tools
    for messages, tools in (
        ([QUESTION], [WEATHER]),
        ([QUESTION, CALLED], []),
        ([QUESTION, RESULT], []),
    ):
        with pytest.raises(CakeError, match="the model's chat template knows no tools; use a model"):
            plain.encode_chat(template_messages(messages), tools)
    assert plain.encode_chat([QUESTION])


def test_what_the_template_refuses_is_said_in_its_words(tokenizer: Tokenizer) -> None:
    twice = {**CALLED, "tool_calls": [*CALLED["tool_calls"], *CALLED["tool_calls"]]}  # type: ignore[misc]
    with pytest.raises(CakeError, match="one call at a time"):
        tokenizer.encode_chat(template_messages([QUESTION, twice]))


def test_text_that_is_no_unicode_is_refused_in_tools_too(tokenizer: Tokenizer) -> None:
    with pytest.raises(CakeError, match="not valid UTF-8"):
        tokenizer.encode_chat([QUESTION], [{**NOW, "note": ["\ud800"]}])


def test_what_is_nested_too_deeply_for_a_template_is_refused(tokenizer: Tokenizer) -> None:
    deep = {"name": "now", "arguments": 900 * '{"a":' + "1" + 900 * "}"}
    called = {"role": "assistant", "tool_calls": [{"function": deep}]}
    with pytest.raises(CakeError, match=r"nested too deeply|are no JSON"):
        tokenizer.encode_chat(template_messages([QUESTION, called]))


def test_choices() -> None:
    tools = [WEATHER, NOW]
    assert read_offer(tools, None) == read_offer(tools, "auto")
    auto, none, required = (read_offer(tools, choice) for choice in ("auto", "none", "required"))
    named = read_offer(tools, {"type": "function", "function": {"name": "now"}})
    assert (auto.names, none.names, required.names) == ({"weather", "now"}, set(), {"weather", "now"})
    assert (auto.grammar, none.grammar, none.for_template) == (None, None, [])
    assert named.names == {"now"}
    assert named.for_template == tools  # what it has called before is still there


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ([WEATHER, WEATHER], "auto", "two tools are called 'weather'"),
        ([], "required", "there are no tools"),
        ([WEATHER], "perhaps", "'perhaps' is not known"),
        ([WEATHER], {"type": "function"}, "is not known"),
        ([WEATHER], {"type": "function", "function": {"name": "bomb"}}, "'bomb', which is none of .*weather"),
        ([{"type": "web_search"}], "auto", "'web_search' are not supported"),
        ([{"type": "function"}], "auto", "has no 'function'"),
        ([{"type": "function", "function": {"name": "a b"}}], "auto", "'a b' cannot be a tool's name"),
        ([{"type": "function", "function": {"name": "a", "parameters": 1}}], "auto", "no JSON schema"),
    ],
)
def test_tools_that_are_refused(tools: Sequence[Mapping[str, Any]], choice: Any, reason: str) -> None:
    with pytest.raises(CakeError, match=reason):
        read_offer(tools, choice)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ({"arguments": "{}"}, "no function with a name"),
        ({"name": "now", "arguments": "{"}, "are no JSON:"),
        ({"name": "now", "arguments": "[]"}, "no JSON object"),
        ({"name": "now", "arguments": 100_000 * '{"a":'}, "are no JSON:"),
    ],
)
def test_calls_that_are_refused(function: dict[str, str], reason: str) -> None:
    with pytest.raises(CakeError, match=reason):
        template_messages([{"role": "assistant", "tool_calls": [{"function": function}]}])


def test_parameters_that_no_call_can_be_held_to(grammars: Grammars) -> None:
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"not": {}}}}
    grammar = read_offer([WEATHER, bad], "required").grammar
    assert grammar is not None
    with pytest.raises(GrammarError, match="Unimplemented keys"):
        grammars.lark(grammar)


async def answers(
    folder: Path, tokenizer: Tokenizer, offer: Offer, grammars: Grammars
) -> list[list[str | Call]]:
    """What the demo model says to this offer, greedily and drawn with three seeds."""
    prompt = tokenizer.encode_chat([QUESTION], offer.for_template)
    grammar = grammars.lark(offer.grammar) if offer.grammar else None
    found: list[list[str | Call]] = []
    async with pipeline_over(folder) as pipeline:
        generator = Generator(pipeline, tokenizer, frozenset({STOP}))
        for seed in range(4):
            sampling = SamplingParams(temperature=float(seed > 0), seed=seed, grammar=grammar)
            reader = CallReader(offer.names)
            found.append([])
            async for piece in generator.answer(prompt, sampling, 120):
                found[-1] += reader.feed(piece.text)
            found[-1] += reader.finish()
    return found


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_call_that_is_asked_for_is_made(
    choice: Any, tooled: Path, tokenizer: Tokenizer, grammars: Grammars
) -> None:
    offer = read_offer([WEATHER, NOW], choice)
    for answer in await answers(tooled, tokenizer, offer, grammars):
        (call,) = answer
        assert isinstance(call, Call)
        assert call.name in offer.names
        Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))


@pytest.mark.parametrize("seed", range(6))
def test_a_call_of_a_strict_tool_that_has_begun_becomes_a_valid_one(
    seed: int, tokenizer: Tokenizer, grammars: Grammars
) -> None:
    offer = read_offer([STRICT], "auto")
    assert offer.grammar is not None
    begun = tokenizer.encode('{"name": "', start=False)
    text = tokenizer.decode(draw(grammars.lark(offer.grammar), json_odds(tokenizer), seed, begun))
    reader = CallReader(offer.names)
    (call,) = reader.feed(text) + reader.finish()
    assert isinstance(call, Call)
    Draft202012Validator(SCHEMAS["weather"]).validate(json.loads(call.arguments))


@pytest.mark.parametrize(
    ("answer", "allowed"),
    [
        ('{"name": "weather", "parameters": {"town": "Rome", "when": "today"}}', True),
        ('{"name": "weather", "parameters": {"town": "Rome"}}', False),
        ('[{"name": "weather", "parameters": {"town": "Rome"}}]', False),
        ('Wait: <function=weather>{"town": 5}</function>', False),
        ('weather.call(town="Rome")', False),
        ("Rome is 3 < 4 km away {or so}.", True),
        ("", True),
    ],
)
def test_strict_tools_leave_no_way_to_call_them_wrongly(
    answer: str, allowed: bool, tokenizer: Tokenizer, grammars: Grammars
) -> None:
    grammar = read_offer([STRICT], "auto").grammar
    assert grammar is not None
    place = grammars.lark(grammar).begin()
    logits = torch.zeros(len(tokenizer.vocabulary))
    tokens = [*tokenizer.encode(answer, start=False), STOP]
    while tokens and place.masked(logits)[tokens[0]] == 0:
        place.advance(tokens.pop(0))
    assert (not tokens) == allowed
