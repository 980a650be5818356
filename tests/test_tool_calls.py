"""Calls in answers as Llama 3.1 and 3.2 write them, whole and letter by letter."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cake.tool_calls import Call, CallReader

NAMES = ["weather", "brave_search", "now"]
ROME = Call("weather", '{"town": "Rome"}')
BARI = Call("weather", '{"town": "Bari"}')
CALL = '{"name": "weather", "parameters": {"town": "Rome"}}'
CALL_2 = '{"name": "weather", "arguments": {"town": "Bari"}}'

ANSWERS: list[tuple[str, list[str | Call]]] = [
    (CALL, [ROME]),
    (f"<|python_tag|>{CALL}", [ROME]),
    (f"\n\n{CALL}\n", [ROME]),
    (CALL.replace(" ", "").replace("{", "{\n  "), [ROME]),
    (f"{CALL}; {CALL_2}", [ROME, BARI]),
    (f"{CALL}\n{CALL_2}", [ROME, BARI]),
    (f"<|python_tag|>{CALL}<|python_tag|>{CALL_2}", [ROME, BARI]),
    (f"[{CALL}, {CALL_2}]", [ROME, BARI]),
    ('{"type": "function", "name": "weather", "parameters": {"town": "Rome"}}', [ROME]),
    ('{"type": "function", "function": "weather", "parameters": {"town": "Rome"}}', [ROME]),
    ('{"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}', [ROME]),
    ('{"parameters": {"town": "Rome"}, "name": "weather"}', [ROME]),
    ('{"name": "now"}', [Call("now", "{}")]),
    ('{"name": "now", "parameters": null}', [Call("now", "{}")]),
    ('<function=weather>{"town": "Rome"}</function>', [ROME]),
    ('<function=weather>\n{"town": "Rome"}\n</function>\n', [ROME]),
    ('<function=weather>{"town": "Rome"}</function><function=now></function>', [ROME, Call("now", "{}")]),
    ('I look: <function=weather>{"town": "Rome"}</function> Done.', ["I look: ", ROME, "Done."]),
    (f"I look: <|python_tag|>{CALL}", ["I look: ", ROME]),
    ('brave_search.call(query="cakes (and \\"pies\\")")',
     [Call("brave_search", '{"query": "cakes (and \\"pies\\")"}')]),
    ('<|python_tag|>weather.call(town="Rome", days=3, short=true)',
     [Call("weather", '{"town": "Rome", "days": 3, "short": true}')]),
    # what is no call
    ("The weather is fine.", ["The weather is fine."]),
    ("weather.calm is a word", ["weather.calm is a word"]),
    ("  so far", ["  so far"]),
    ("[1] says so; [2] does not", ["[1] says so; [2] does not"]),
    ("1 < 2 <function", ["1 < 2 <function"]),
    ('{"town": "Rome"}', ['{"town": "Rome"}']),
    ("{}", ["{}"]),
    ("{", ["{"]),
    ('{"name": "bomb", "parameters": {}}', ['{"name": "bomb", "parameters": {}}']),
    ('{"name": "weather", "parameters": "Rome"}', ['{"name": "weather", "parameters": "Rome"}']),
    ('{"name": "weather", "parameters": {"x": NaN}}', ['{"name": "weather", "parameters": {"x": NaN}}']),
    ("<function=bomb>{}</function>", ["<function=bomb>{}</function>"]),
    (CALL[:-3], [CALL[:-3]]),
    ('<function=weather>{"town": "Ro', ['<function=weather>{"town": "Ro']),
    ('weather.call(town="Ro', ['weather.call(town="Ro']),
    (f"{CALL} and so on", [ROME, "and so on"]),
    (f"{CALL}; {CALL_2[:20]}", [ROME, CALL_2[:20]]),
    (f'{CALL[:-3]} <function=weather>{{"town": "Bari"}}</function>', [f"{CALL[:-3]} ", BARI]),
]  # fmt: skip


def read(pieces: list[str]) -> list[str | Call]:
    reader = CallReader(NAMES)
    whole: list[str | Call] = []
    for each in [*(each for piece in pieces for each in reader.feed(piece)), *reader.finish()]:
        if isinstance(each, str) and whole and isinstance(whole[-1], str):
            whole[-1] += each
        else:
            whole.append(each)
    return whole


@pytest.mark.parametrize(("answer", "wanted"), ANSWERS)
def test_calls_and_text(answer: str, wanted: list[str | Call]) -> None:
    assert read([answer]) == wanted
    assert read(list(answer)) == wanted
    for seed in range(20):
        chance = random.Random(seed)
        cuts = sorted(chance.sample(range(len(answer) + 1), min(3, len(answer))))
        assert read([answer[i:j] for i, j in zip([0, *cuts], [*cuts, len(answer)], strict=True)]) == wanted


MARKS = [
    "<function=weather>",
    "<function=",
    "</function>",
    "<|python_tag|>",
    "weather",
    ".call(",
    "town=5",
    ")",
]
SIGNS = ["{", "}", "[", "; ", '"name": ', '"', "\\", " ", "<", "Rome"]
PARTS = st.sampled_from([CALL, CALL_2, *MARKS, *SIGNS])


@given(st.lists(PARTS, max_size=8), st.data())
def test_pieces_do_not_matter_and_no_text_is_lost(parts: list[str], data: st.DataObject) -> None:
    answer = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=4)))
    pieces = [answer[i:j] for i, j in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert read(pieces) == read([answer])
    reader = CallReader([])  # of tools that nobody offers
    assert "".join(map(str, [*reader.feed(answer), *reader.finish()])) == answer


def test_every_call_has_its_own_id() -> None:
    ids = {each.id for each in read([f"{CALL};{CALL}"]) if isinstance(each, Call)}
    assert len(ids) == 2
    assert all(each.startswith("call_") for each in ids)


def test_text_is_not_held_back_longer_than_it_may_be_a_call() -> None:
    reader = CallReader(NAMES)
    assert reader.feed("The") == ["The"]
    assert reader.feed(" sky <") == [" sky "]
    assert reader.feed("b") == ["<b"]
    assert CallReader(NAMES).feed('{"town": ') == ['{"town": ']


def test_a_call_comes_as_soon_as_it_is_complete() -> None:
    reader = CallReader(NAMES)
    assert reader.feed(CALL[:-1]) == []
    assert reader.feed("}") == [ROME]
    assert reader.finish() == []


def test_arguments_are_json_whatever_is_in_them() -> None:
    wild = {"town": 'K\u00f6ln "\\ud800" \n', "deep": [[{"a": None}]], "surrogate": "\ud800"}
    text = json.dumps({"name": "weather", "parameters": wild})
    (call,) = read([text])
    assert isinstance(call, Call)
    assert json.loads(call.arguments) == wild
    call.arguments.encode()


def test_what_is_nested_too_deeply_is_text() -> None:
    answer = '{"name": "weather", "parameters": ' + '{"a": ' * 200_000
    assert read([answer]) == [answer]
