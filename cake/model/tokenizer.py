"""Text to token ids and back: the chat template, and a detokenizer that streams whole characters.

`transformers` does the work; this room knows which of its classes keeps to a model's own files.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cake.errors import CakeError, CheckpointError

Chat = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
PROBE = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {}}}
UNFINISHED = "\ufffd"


BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")


def _byte_of() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with: printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_of()


class Tokenizer:
    """A model's tokenizer."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # A class that is named in tokenizer_config.json may rebuild the tokenizer from its parts and
        # lose some; the plain class takes tokenizer.json as it is.
        has_file = (folder / "tokenizer.json").is_file()
        kind = PreTrainedTokenizerFast if has_file else AutoTokenizer
        try:
            self._tokenizer: Any = kind.from_pretrained(str(folder))
        except Exception as error:  # transformers raises whatever its parsers do
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{folder}: its tokenizer cannot be read: {reason}") from error
        if self._tokenizer.is_fast:  # where a file says how to cut texts, the first one would change that
            self._tokenizer.backend_tokenizer.no_truncation()
            self._tokenizer.backend_tokenizer.no_padding()

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was trained to answer messages."""
        return bool(self._tokenizer.chat_template)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return dict(self._tokenizer.get_vocab())

    @property
    def serialized(self) -> str:
        """All of it, as tokenizer.json would say it."""
        return str(self._tokenizer.backend_tokenizer.to_str())

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Token ids of plain text; at its start with the start token, where the model wants one."""
        _check_text(text)
        return list(self._tokenizer(text, add_special_tokens=start).input_ids)

    @functools.cached_property
    def knows_tools(self) -> bool:
        """Whether the chat template tells the model of tools; those that do not leave them out in silence."""
        hello = [{"role": "user", "content": "hello"}]
        return self.has_chat_template and self._rendered(hello) != self._rendered(hello, [PROBE])

    def encode_chat(self, messages: Chat, tools: Tools = ()) -> list[int]:
        """Token ids of a chat, up to where the assistant's answer begins.

        `tools`, and messages that call them or bring their results, are such as `cake.tools` gives.
        """
        for text in texts_in([*messages, *tools]):
            _check_text(text)
        of_tools = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if (tools or of_tools) and not self.knows_tools:
            raise CakeError(
                "the model's chat template knows no tools; use a model that was trained to call them, "
                "such as Llama 3.1 or a later one"
            )
        return self._rendered(messages, tools)

    def _rendered(self, messages: Chat, tools: Tools = ()) -> list[int]:
        from jinja2 import TemplateError

        try:
            ids = self._tokenizer.apply_chat_template(
                list(messages),
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=True,
                return_dict=False,
            )
        except TemplateError as error:
            raise CakeError(
                f"the model's chat template refuses this: {error}; try --system-prompt '' or --raw"
            ) from error
        except RecursionError as error:
            raise CakeError("the tools, or the arguments of a call, are nested too deeply") from error
        return list(ids)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, which need not be whole characters; a special token is its name."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if token in self._tokenizer.all_special_ids:
            return name.encode()
        if BYTE_NAME.fullmatch(name):  # SentencePiece's way to write bytes
            return bytes.fromhex(name[3:5])
        if all(character in BYTE_OF for character in name):  # the way of GPT-2, and of Llama 3
            return bytes(BYTE_OF[character] for character in name)
        return name.replace("\u2581", " ").encode()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def texts_in(value: object) -> Iterator[str]:
    """Every text in what came as JSON."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, Sequence):
            waiting += each


def _check_text(text: str) -> None:
    """Bytes that are no UTF-8 reach Python as lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CakeError(f"the text is not valid UTF-8 (at character {error.start})") from error


class Detokenizer:
    """Turns tokens into text as they come, and holds back what may become a whole character.

    A token's text can depend on the one before it (spaces, bytes of one character), so each piece
    is the difference between two decodings of a short window.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # the window's first token
        self._shown = 0  # tokens whose text has been given out

    def add(self, token: int) -> str:
        """The text that is certain now; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(UNFINISHED):
            return ""
        return self._give(text)

    def finish(self) -> str:
        """What was held back, at the end of an answer."""
        return self._give(self._new_text())

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._start, self._shown = self._shown, len(self._ids)
        return text
