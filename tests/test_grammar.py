"""Answers that keep to a grammar, held against `jsonschema`, which knows nothing of how they were made."""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pipeline_over
from drawn_answers import STOP, Odds, draw, json_odds
from jsonschema import Draft202012Validator

from cake.errors import CakeError, GrammarError
from cake.generator import Generator, Piece
from cake.model.grammar import Grammars, Place, json_rule
from cake.model.sampling import Sampler, SamplingParams
from cake.model.tokenizer import Tokenizer
from cake.speculation import NGrams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "job": {"enum": ["baker", "pilot", "teacher"]},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age", "job", "hobbies", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"town": {"type": "string", "maxLength": 16}, "by_the_sea": {"type": "boolean"}},
            "required": ["town", "by_the_sea"],
            "additionalProperties": False,
        }
    },
}
MEASURES = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4}
EITHER = {
    "anyOf": [{"type": "null"}, {"type": "object", "properties": {"ok": {"const": True}}, "required": ["ok"]}]
}


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, {STOP})


@pytest.fixture(scope="module")
def odds(tokenizer: Tokenizer) -> Odds:
    return json_odds(tokenizer)


def random_schema(chance: random.Random, depth: int = 3) -> dict[str, Any]:
    """Anything from a number to objects in arrays in objects."""
    kind = chance.choice(["string", "integer", "number", "boolean", "enum", "array", "object", "anyOf"])
    if kind == "enum":
        return {"enum": chance.sample(["red", 'a "quoted" one', "Köln", 7, -2.5, True, None, "\n"], 3)}
    if depth == 0 or kind in ("boolean", "string"):
        return {"type": "string", "minLength": chance.randint(0, 3), "maxLength": chance.randint(3, 9)}
    if kind in ("integer", "number"):
        low = chance.randint(-50, 50)
        return {"type": kind, "minimum": low, "maximum": low + chance.randint(0, 2000)}
    if kind == "array":
        least = chance.randint(0, 2)
        items = random_schema(chance, depth - 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + 1}
    if kind == "anyOf":
        return {"anyOf": [random_schema(chance, depth - 1) for _ in range(2)]}
    names = chance.sample(["id", "größe", 'with "quotes"', "a b", "x"], chance.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(chance, depth - 1) for name in names},
        "required": names[: chance.randint(0, len(names))],
        "additionalProperties": False,
    }


@pytest.mark.parametrize("seed", range(40))
def test_what_is_drawn_keeps_to_the_schema(
    seed: int, grammars: Grammars, odds: Odds, tokenizer: Tokenizer
) -> None:
    schema = random_schema(random.Random(seed))
    ids = draw(grammars.json_schema(schema), odds, seed)
    assert not list(Draft202012Validator(schema).iter_errors(json.loads(tokenizer.decode(ids))))


def test_json_object(grammars: Grammars, odds: Odds, tokenizer: Tokenizer) -> None:
    for seed in range(8):
        assert isinstance(json.loads(tokenizer.decode(draw(grammars.json_object(), odds, seed))), dict)


async def answer(
    folder: Path, prompt: Sequence[int], sampling: SamplingParams, schema: dict[str, Any], speculate: bool
) -> list[Piece]:
    """What the demo model says, which is to come to its end by itself."""
    async with pipeline_over(folder) as pipeline:
        proposer = NGrams if speculate else None
        generator = Generator(pipeline, Tokenizer(folder), frozenset({STOP}), new_proposer=proposer)
        sampling = replace(sampling, grammar=generator.grammars.json_schema(schema))
        pieces = [piece async for piece in generator.answer(prompt, sampling, 160)]
    assert pieces[-1].finish_reason == "stop"
    return pieces


@pytest.mark.parametrize(
    ("schema", "temperature"), [(PERSON, 0.0), (PERSON, 1.0), (MEASURES, 0.0), (EITHER, 1.0)]
)
async def test_the_demo_model_keeps_to_a_schema_with_proposals_and_without(
    schema: dict[str, Any], temperature: float, tokenizer: Tokenizer, demo_model: Path
) -> None:
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Describe a person in JSON, with a name."}])
    sampling = SamplingParams(temperature=temperature)
    plain = await answer(demo_model, prompt, sampling, schema, speculate=False)
    Draft202012Validator(schema).validate(json.loads("".join(piece.text for piece in plain)))
    proposed = await answer(demo_model, prompt, sampling, schema, speculate=True)
    assert [piece.token for piece in proposed] == [piece.token for piece in plain]


def test_only_a_complete_text_may_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    place = grammars.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}}).begin()
    logits = torch.zeros(len(tokenizer.vocabulary))
    for token in tokenizer.encode('{"a": 12}', start=False):
        masked = place.masked(logits)
        assert masked[token] == 0
        assert masked[STOP] == -torch.inf
        place.advance(token)
    assert torch.isfinite(place.masked(logits)).nonzero().flatten().tolist() == [STOP]
    place.advance(STOP)
    place.advance(5)  # what a draft guesses behind the end
    assert torch.isfinite(place.masked(logits)).nonzero().flatten().tolist() == [STOP]


def test_a_text_that_may_end_or_go_on(grammars: Grammars, tokenizer: Tokenizer) -> None:
    place = grammars.json_schema({"type": "integer"}).begin()
    logits = torch.zeros(len(tokenizer.vocabulary))
    (seven,) = tokenizer.encode("7", start=False)
    assert place.masked(logits)[STOP] == -torch.inf
    place.advance(seven)
    masked = place.masked(logits)
    assert masked[STOP] == 0
    assert masked[seven] == 0


def test_rows_of_the_head_without_a_token_are_never_drawn(grammars: Grammars) -> None:
    place = grammars.json_object().begin()
    masked = place.masked(torch.zeros(50_000))
    assert torch.isfinite(masked[:49_152]).any()
    assert not torch.isfinite(masked[49_152:]).any()


def test_verify_draws_as_sample_does(grammars: Grammars, odds: Odds) -> None:
    params = SamplingParams(grammar=grammars.json_schema(MEASURES), repeat_penalty=1.0)
    rows = torch.stack([odds(seed) for seed in range(6)])
    one_by_one, guesser = Sampler(params), Sampler(params)
    wanted: list[int] = []
    for row in rows:
        wanted.append(one_by_one.sample(row, wanted))
    twin = guesser.twin()
    assert guesser.verify(rows[:4], [], wanted[:3]) == wanted[:4]
    assert guesser.verify(rows[4:], wanted[:4], [wanted[4]]) == wanted[4:]
    assert twin.verify(rows[:3], [], [wanted[0], STOP]) == wanted[:2]  # a wrong proposal moves nothing
    assert twin.verify(rows[2:], wanted[:2], wanted[2:5]) == wanted[2:]


def nested(depth: int) -> dict[str, Any]:
    """Arrays in arrays."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "frob"}, "Invalid type: frob"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum .5. is greater than maximum .1."),
        ({"allOf": [{"type": "string"}, {"type": "number"}]}, "incompatible types"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: ."not".'),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "http://example.org/schema"}, "does not fetch"),
        (nested(300), "recursion limit exceeded"),
        (nested(100_000), "is no JSON: maximum recursion depth"),
        ({"const": float("inf")}, "is no JSON"),
        ({"const": "\ud800"}, "is no JSON"),
    ],
)
def test_what_no_text_can_be_held_to_is_refused(
    schema: dict[str, Any], reason: str, grammars: Grammars
) -> None:
    with pytest.raises(GrammarError, match=reason) as refused:
        grammars.json_schema(schema)
    assert "\n" not in str(refused.value)


def test_what_turns_out_to_be_too_much_is_said_then(grammars: Grammars, tokenizer: Tokenizer) -> None:
    many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
    place = grammars.json_schema(many).begin()
    with pytest.raises(GrammarError, match=r"held to this any further: .* items; max is 2000"):
        for token in tokenizer.encode('{"', start=False):
            place.advance(token)


def test_the_first_step_is_tried_before_an_answer_begins(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(place: Place) -> None:
        raise GrammarError("too much")

    monkeypatch.setattr(Place, "allowed", too_much)
    with pytest.raises(GrammarError, match="too much"):
        grammars.json_object()


def test_a_schema_cannot_switch_the_refusals_off(grammars: Grammars) -> None:
    with pytest.raises(GrammarError, match="Unimplemented keys"):
        grammars.json_schema({"not": {"type": "string"}, "x-guidance": {"lenient": True}})


def test_a_model_without_an_end_token(tokenizer: Tokenizer) -> None:
    with pytest.raises(GrammarError, match="no end token"):
        Grammars(tokenizer, set())


def test_without_the_library(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(CakeError, match=r"pip install 'cake\[api\]'"):
        grammars.json_object()


def test_a_schema_within_a_grammar_has_its_own_root(
    grammars: Grammars, odds: Odds, tokenizer: Tokenizer
) -> None:
    grammar = grammars.lark(f'start: "person: " person\nperson: {json_rule(PERSON)}')
    text = tokenizer.decode(draw(grammar, odds, 3))
    assert text.startswith("person: ")
    Draft202012Validator(PERSON).validate(json.loads(text.removeprefix("person: ")))
