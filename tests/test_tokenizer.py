"""Text to tokens and back; streamed text is whole characters and nothing is lost."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import WordLevel

from cake.errors import CheckpointError
from cake.model.tokenizer import Detokenizer, Tokenizer
from cake.weights.demo_model import demo_model_folder

VOCABULARY = 49152
IM_START, IM_END = 1, 2
TEXTS = {
    "plain": "The quick brown fox, 12345 times.",
    "emoji": "🙂🎂 and 👍🏽",
    "joined emoji": "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🧑🏿‍🚀 astronaut",
    "chinese": "分布式推理：把一个大模型切成几块。",
    "accents": "Žluťoučký kůň, naïve café, Ångström, e\u0301 combining",
    "newlines": "\n\none\r\n\ttwo\n   three\n\n",
    "leading spaces": "   three spaces before",
    "arabic": "السلام عليكم",
    "rare": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u00a0\u200b\ufeff ꙮ",
}


@cache
def demo_tokenizer() -> Tokenizer:
    """One for all examples: hypothesis frowns on fixtures, and loading takes a while."""
    return Tokenizer(demo_model_folder(lambda _: True))


@pytest.fixture
def tokenizer() -> Tokenizer:
    return demo_tokenizer()


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The pieces as they come, the last one from `finish`."""
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


def test_every_digit_is_a_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("12345") == [33, 34, 35, 36, 37]


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>a<|im_end|>")
    assert (ids[0], ids[-1], len(ids)) == (IM_START, IM_END, 3)
    assert tokenizer.decode(ids) == "a"


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_streamed_text_is_whole(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not [piece for piece in pieces if "\ufffd" in piece]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_nothing_is_held_back_that_is_certain(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    detokenizer, shown = Detokenizer(tokenizer), ""
    for n, token in enumerate(ids, 1):
        shown += detokenizer.add(token)
        so_far = tokenizer.decode(ids[:n])
        if not so_far.endswith("\ufffd"):
            assert shown == so_far
    assert detokenizer.finish() == ""


def test_an_unfinished_character_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 🧌")
    assert len(ids) > 3  # the troll takes several tokens
    pieces = stream(tokenizer, ids[:-1])
    assert "".join(pieces) == tokenizer.decode(ids[:-1])
    assert "\ufffd" in pieces[-1]
    assert "\ufffd" not in "".join(pieces[:-1])


def test_nothing_from_nothing(tokenizer: Tokenizer) -> None:
    assert stream(tokenizer, []) == [""]
    assert stream(tokenizer, [IM_END]) == ["", ""]


def test_a_space_that_depends_on_the_token_before(tmp_path: Path) -> None:
    """Some decoders drop the space of the first token they see, whichever that is."""
    backend = Backend(WordLevel({"▁one": 0, "▁two": 1, "!": 2}, unk_token="!"))
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    words = Tokenizer(tmp_path)
    assert words.decode([1]) == "two"
    assert stream(words, [0, 1, 2, 0]) == ["one", " two", "!", " one", ""]


# Bytes that are no character by themselves are what goes wrong; random ids seldom are such tokens.
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(0, VOCABULARY - 1), st.integers(0, 300)), max_size=24))
def test_any_tokens_stream_to_what_they_decode_to(ids: list[int]) -> None:
    tokenizer = demo_tokenizer()
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=30))
def test_any_text_streams_in_whole_characters(text: str) -> None:
    tokenizer = demo_tokenizer()
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):  # the vocabulary lacks bytes of a few rare characters
        assert not [piece for piece in pieces if "\ufffd" in piece]


SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (
            [{"role": "user", "content": "Hi"}],
            SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "Bye"},
            ],
            SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_chat_template(messages: list[dict[str, str]], text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.has_chat_template
    ids = tokenizer.encode_chat(messages)
    assert ids == tokenizer.encode(text)
    assert ids[0] == IM_START


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (None, ""),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "Unheard"}}'),
    ],
)
def test_unreadable_tokenizer(name: str | None, content: str, tmp_path: Path) -> None:
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"its tokenizer cannot be read: .+") as raised:
        Tokenizer(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_tokenizer_without_a_chat_template(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((demo_model / "tokenizer.json").read_bytes())
    assert not Tokenizer(tmp_path).has_chat_template


def test_reading_a_text_changes_nothing_for_those_beside_it(demo_model: Path, tmp_path: Path) -> None:
    told = json.loads((demo_model / "tokenizer.json").read_text())
    told["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    tokenizer = Tokenizer(tmp_path)
    before = tokenizer.serialized
    assert len(tokenizer.encode("12345")) == 5
    assert tokenizer.serialized == before
