"""The chat: what it remembers of answers that were stopped, by a person or by an error."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cake.chat import run_chat
from cake.errors import NodeLostError
from cake.generator import Piece
from cake.master import Master
from cake.session import Session

Script = list[str | BaseException | None]


class Letters:
    """A tokenizer whose tokens are letters; a chat's are all its words."""

    def encode(self, text: str, start: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode(" ".join(message["content"] for message in messages))


class Talker(Master):
    """A master without a model."""

    def __init__(self, raw: bool) -> None:
        parts: dict[str, Any] = {"tokenizer": Letters(), "options": SimpleNamespace(max_tokens=9)}
        self.__dict__.update(parts, raw=raw, sampling=None)

    @property
    def model_name(self) -> str:
        return "none"

    def system_messages(self) -> list[dict[str, str]]:
        return []


class Answers:
    """A generator that says what a script says: pieces of text, errors to raise, None for Ctrl-C."""

    pipeline = SimpleNamespace(stages=())

    def __init__(self, *scripts: Script) -> None:
        self.scripts, self.prompts = list(scripts), list[str]()

    def check(self, prompt: Sequence[int]) -> None:
        """All are good."""

    async def generate(
        self, session: Session, prompt: list[int], sampling: None, most: int, count: Callable[[int], object]
    ) -> AsyncIterator[Piece]:
        self.prompts.append("".join(map(chr, prompt)))
        session.keep_prefix(prompt)
        for said in self.scripts.pop(0):
            if said is None:
                signal.raise_signal(signal.SIGINT)
                await asyncio.Event().wait()
            elif isinstance(said, BaseException):
                raise said
            else:
                session.ids.append(ord(said))
                yield Piece(ord(said), said)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Says lines to a chat, and returns the prompts that it makes of them."""

    class Lines:
        async def next(self) -> str | None:
            return lines.pop(0) if lines else None

    def talk(raw: bool, *scripts: Script) -> list[str]:
        answers: Any = Answers(*scripts)
        lines[:] = ["one?", "two?", "three?"]
        asyncio.run(run_chat(Talker(raw), answers))
        return answers.prompts

    lines: list[str] = []
    monkeypatch.setattr("cake.chat._Lines", Lines)
    return talk


LOST = NodeLostError("nobody is there; start somebody")


@pytest.mark.parametrize("stop", [LOST, None], ids=["error", "Ctrl-C"])
def test_what_was_shown_of_an_answer_is_remembered(
    chat: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], stop: BaseException | None
) -> None:
    prompts = chat(False, ["A"], ["B", stop], ["C"])
    assert prompts == ["one?", "one? A two?", "one? A two? B three?"]
    shown = capsys.readouterr()
    assert shown.out == "A\nB\nC\n"
    assert ("Error: nobody is there; start somebody" in shown.err) == (stop is LOST)
    assert ("1 tokens (error)" in shown.err) == (stop is LOST)


@pytest.mark.parametrize("raw", [False, True], ids=["template", "raw"])
def test_a_line_that_only_got_an_error_is_forgotten(
    chat: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], raw: bool
) -> None:
    prompts = chat(raw, [LOST], ["B"], [LOST])
    assert prompts[:2] == ["one?", "two?"]
    assert prompts[2] == ("two?B\nthree?\n" if raw else "two? B three?")
    shown = capsys.readouterr()
    assert shown.out == "B\n"
    assert shown.err.count("Error: nobody is there; start somebody; this line is forgotten") == 2


def test_what_is_no_error_of_ours_ends_the_chat(chat: Callable[..., list[str]]) -> None:
    with pytest.raises(ZeroDivisionError):
        chat(False, [ZeroDivisionError()])
