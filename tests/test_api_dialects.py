"""What every dialect owes its clients, with a generator that says what the test wants it to say."""

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import anthropic
import httpx
import httpx2
import ollama
import pytest
from http_served import message_in
from tool_template import with_tools

from cake.api import json_body
from cake.api import service as service_module
from cake.api.anthropic.requests import Prompt
from cake.api.app import build_app
from cake.api.service import Service
from cake.cluster_view import ClusterView
from cake.errors import NodeLostError
from cake.generator import Generator, Piece
from cake.model.sampling import SamplingParams
from cake.model.tokenizer import Tokenizer
from cake.weights.checkpoint import Checkpoint

KEY = "sesame"
QUESTION = [{"role": "user", "content": "What is the weather in Rome?"}]
PARAMETERS = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
FUNCTION = {"name": "weather", "description": "The weather in a town", "parameters": PARAMETERS}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}
ANTHROPICS_TOOL: Any = {
    "name": "weather",
    "description": "The weather in a town",
    "input_schema": PARAMETERS,
}
CALL = ['{"name": "weather", ', '"parameters": {"town": "Rome"}}']
TEXT_AND_CALL = ["Let me ", "see. ", "<function=weather>", '{"town": "Rome"}</function>']


class Scripted:
    """A generator that says the same to everybody, and fails in the end if it has an error."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer, self.figures = Tokenizer(folder), SimpleNamespace()
        self.pipeline = SimpleNamespace(context=2048, config=Checkpoint(folder).config)
        self.says: Sequence[str] = ("Hel", "lo")
        self.error: Exception | None = None
        self.lasts = asyncio.Event()  # set when it has begun and will not end by itself
        self.for_ever, self.left = False, False
        self.asked = ""  # the prompt that came last

    def check(self, prompt: Sequence[int]) -> None:
        """Takes any."""

    async def answer(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        count: Callable[[int], None],
        copies: bool,
    ) -> AsyncIterator[Piece]:
        """A token for each part of what it says."""
        self.asked = self.tokenizer.decode(prompt)
        count(0)
        count(len(prompt))
        for text in self.says[:-1]:
            yield Piece(5, text)
        if self.for_ever:
            await self._wait()
        if self.error is not None and not self.says:
            raise self.error
        yield Piece(5, self.says[-1], "stop" if self.error is None else None)
        if self.error is not None:
            raise self.error

    async def _wait(self) -> None:
        self.lasts.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left = True


class Served(NamedTuple):
    """An application without a network, and clients of the dialects."""

    app: Any
    generator: Scripted
    http: httpx2.AsyncClient
    ollama: ollama.AsyncClient
    anthropic: anthropic.AsyncAnthropic


@pytest.fixture(scope="module")
def folder(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tools(demo_model, tmp_path_factory.mktemp("tooled"))


@pytest.fixture
async def served(folder: Path) -> AsyncIterator[Served]:
    generator = Scripted(folder)
    service = Service(cast("Generator", generator), "demo", SamplingParams())
    app: Any = build_app(service, cast("ClusterView", None), KEY)
    url = "http://demo"
    bearer = {"Authorization": f"Bearer {KEY}"}
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=url, headers=bearer)
    of_ollama = ollama.AsyncClient(url, transport=httpx.ASGITransport(app), headers=bearer)
    async with http, of_ollama:
        of_anthropic = anthropic.AsyncAnthropic(base_url=url, api_key=KEY, max_retries=0, http_client=http)
        yield Served(app, generator, http, of_ollama, of_anthropic)


async def test_ollamas_clients_call_tools(served: Served) -> None:
    served.generator.says = CALL
    answer = await served.ollama.chat("demo", QUESTION, tools=[TOOL])
    (call,) = answer.message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("weather", {"town": "Rome"})
    assert (answer.message.content, answer.done_reason) == ("", "stop")
    assert json.dumps(TOOL)[:60] in served.generator.asked
    lines = [line async for line in await served.ollama.chat("demo", QUESTION, tools=[TOOL], stream=True)]
    assert [call for line in lines for call in line.message.tool_calls or ()] == [call]
    assert lines[-1].done


async def test_ollamas_clients_tell_what_came_of_calls(served: Served) -> None:
    call = {"function": {"name": "weather", "arguments": {"town": "Rome"}}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_name": "weather", "content": "sunny"}
    answer = await served.ollama.chat("demo", [*QUESTION, said, result], tools=[TOOL])
    assert answer.message.content == "Hello"
    assert '{"name": "weather", "parameters": {"town": "Rome"}}' in served.generator.asked
    assert "ipython\nsunny" in served.generator.asked
    assert (await served.ollama.show("demo")).capabilities == ["completion", "tools"]


async def test_anthropics_clients_call_tools(served: Served) -> None:
    wanted: Any = {"model": "demo", "messages": QUESTION, "max_tokens": 99, "tools": [ANTHROPICS_TOOL]}
    served.generator.says = CALL
    message = await served.anthropic.messages.create(**wanted)
    (block,) = message.content
    assert block.type == "tool_use"
    assert (block.name, block.input) == ("weather", {"town": "Rome"})
    assert message.stop_reason == "tool_use"
    assert json.dumps(FUNCTION)[:60] in served.generator.asked


async def test_anthropics_streams_have_a_block_for_text_and_for_each_call(served: Served) -> None:
    wanted: Any = {"model": "demo", "messages": QUESTION, "max_tokens": 99, "tools": [ANTHROPICS_TOOL]}
    served.generator.says = TEXT_AND_CALL
    async with served.anthropic.messages.stream(**wanted) as stream:
        kinds = [event.type async for event in stream if event.type.startswith("content_block")]
        message = await stream.get_final_message()
    assert [block.type for block in message.content] == ["text", "tool_use"]
    text, call = message.content
    assert text.type == "text"
    assert text.text == "Let me see. "
    assert call.type == "tool_use"
    assert call.input == {"town": "Rome"}
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    assert message.stop_reason == "tool_use"
    whole = await served.anthropic.messages.create(**wanted)
    assert [block.type for block in whole.content] == ["text", "tool_use"]


async def test_anthropics_clients_tell_what_came_of_calls(served: Served) -> None:
    call = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"town": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sunny"}]}
    failed = {"type": "tool_result", "tool_use_id": "c1", "content": "no such town", "is_error": True}
    for block, told in ((result, "ipython\nsunny"), (failed, "ipython\nError: no such town")):
        turn = [
            *QUESTION,
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [block, {"type": "text", "text": "And now?"}]},
        ]
        wanted: Any = {"model": "demo", "messages": turn, "max_tokens": 9, "tools": [ANTHROPICS_TOOL]}
        await served.anthropic.messages.create(**wanted)
        assert '{"name": "weather", "parameters": {"town": "Rome"}}' in served.generator.asked
        assert re.search(rf"{re.escape(told)}.*user\nAnd now\?", served.generator.asked, re.DOTALL)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"type": "tool", "name": "bomb"}, "'bomb', which is none of the tools: weather"),
        ({"type": "auto", "disable_parallel_tool_use": True}, "disable_parallel_tool_use"),
        ({"type": "perhaps"}, "tool_choice: "),
    ],
)
async def test_choices_that_are_refused(served: Served, choice: Any, reason: str) -> None:
    wanted: Any = {"model": "demo", "messages": QUESTION, "max_tokens": 9, "tools": [ANTHROPICS_TOOL]}
    with pytest.raises(anthropic.BadRequestError, match=reason):
        await served.anthropic.messages.create(**wanted, tool_choice=choice)


@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        ({"type": "auto"}, []),
        ({"type": "any"}, ["weather", "other"]),
        ({"type": "tool", "name": "other", "disable_parallel_tool_use": True}, ["other"]),
    ],
)
def test_which_tools_must_be_called(choice: Any, forced: list[str]) -> None:
    tools = [ANTHROPICS_TOOL, {"name": "other", "input_schema": {"type": "object"}, "strict": True}]
    body = {"model": "demo", "messages": QUESTION, "tools": tools, "tool_choice": choice}
    offer = Prompt.model_validate(body).offer
    assert [tool.name for tool in offer.forced] == forced
    assert [tool.strict for tool in offer.tools] == [False, True]


async def test_text_behind_a_call_is_a_block_of_its_own(served: Served) -> None:
    wanted: Any = {"model": "demo", "messages": QUESTION, "max_tokens": 99, "tools": [ANTHROPICS_TOOL]}
    served.generator.says = [*CALL, " So", " be it."]
    whole = await served.anthropic.messages.create(**wanted)
    async with served.anthropic.messages.stream(**wanted) as stream:
        streamed = await stream.get_final_message()
    for message in (whole, streamed):
        assert [block.type for block in message.content] == ["tool_use", "text"]
        assert message.content[1].text.strip() == "So be it."  # type: ignore[union-attr]


async def test_who_must_not_call_is_not_told_of_tools(served: Served) -> None:
    wanted: Any = {"model": "demo", "messages": QUESTION, "max_tokens": 9, "tools": [ANTHROPICS_TOOL]}
    await served.anthropic.messages.create(**wanted, tool_choice={"type": "none"})
    assert "weather in a town" not in served.generator.asked


OPENAI = ("/v1/chat/completions", {"model": "demo", "messages": QUESTION})
OLLAMA = ("/api/chat", {"model": "demo", "messages": QUESTION})
OLLAMAS_TEXT = ("/api/generate", {"model": "demo", "prompt": "Hello"})
ANTHROPIC = ("/v1/messages", {"model": "demo", "messages": QUESTION, "max_tokens": 9})
Asking = tuple[str, dict[str, Any]]
OPENAIS_TEXT = ("/v1/completions", {"model": "demo", "prompt": "Hello"})
COUNT = ("/v1/messages/count_tokens", {"model": "demo", "messages": QUESTION})
LONG = "sea " * service_module.LONG_TEXT
all_dialects = pytest.mark.parametrize(
    "asking", [OPENAI, OLLAMA, OLLAMAS_TEXT, ANTHROPIC], ids=["openai", "ollama", "generate", "anthropic"]
)
whole_or_not = pytest.mark.parametrize("stream", [False, True])


@all_dialects
@whole_or_not
async def test_where_there_is_no_room_that_is_said_before_a_stream_begins(
    served: Served, asking: Asking, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "MOST_REQUESTS", 0)
    path, body = asking
    answer = await served.http.post(path, json={**body, "stream": stream})
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert "try again" in message_in(answer.json())
    if asking == ANTHROPIC:
        assert answer.json()["error"]["type"] == "overloaded_error"


@all_dialects
async def test_an_error_amid_a_stream_ends_it(served: Served, asking: Asking) -> None:
    served.generator.error = NodeLostError("worker 'pc' is gone")
    path, body = asking
    answer = await served.http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if "error" in line]
    assert message_in(json.loads(lines[-1])) == "worker 'pc' is gone"
    whole = await served.http.post(path, json={**body, "stream": False})
    assert (whole.status_code, message_in(whole.json())) == (503, "worker 'pc' is gone")


@all_dialects
@whole_or_not
async def test_an_error_before_the_first_token_has_a_status_of_its_own(
    served: Served, asking: Asking, stream: bool
) -> None:
    served.generator.says, served.generator.error = (), NodeLostError("worker 'pc' is gone")
    path, body = asking
    answer = await served.http.post(path, json={**body, "stream": stream})
    assert (answer.status_code, message_in(answer.json())) == (503, "worker 'pc' is gone")
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["Retry-After"]) > 0


@all_dialects
@whole_or_not
@pytest.mark.parametrize("says", [("Hel", "lo"), ("lo",)], ids=["amid", "before"])
async def test_a_client_that_leaves_ends_its_answer(
    served: Served, asking: Asking, stream: bool, says: Sequence[str]
) -> None:
    path, body = asking
    served.generator.for_ever, served.generator.says = True, says
    arriving = [{"type": "http.request", "body": json.dumps({**body, "stream": stream}).encode()}]

    async def receive() -> dict[str, Any]:
        if arriving:
            return arriving.pop()
        await served.generator.lasts.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        pass

    headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"host", b"demo")]
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
    scope |= {"method": "POST", "scheme": "http", "path": path, "raw_path": path.encode()}
    await served.app({**scope, "query_string": b"", "headers": headers}, receive, send)
    assert served.generator.left


@pytest.mark.parametrize("asking", [OPENAI, OPENAIS_TEXT, OLLAMA, OLLAMAS_TEXT, ANTHROPIC, COUNT])
async def test_nobody_waits_until_a_long_text_is_read(
    served: Served, asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, is_read, may_be_read = served.generator.tokenizer, asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(encode: Callable[..., list[int]]) -> Callable[..., list[int]]:
        def encoded(*arguments: Any) -> list[int]:
            if LONG in str(arguments):
                loop.call_soon_threadsafe(is_read.set)
                assert may_be_read.wait(20)
            return encode(*arguments)

        return encoded

    for name in ("encode", "encode_chat"):
        monkeypatch.setattr(tokenizer, name, slow(getattr(tokenizer, name)))
    path, body = asking
    with_long = re.sub("Rome|Hello", LONG, json.dumps({**body, "stream": False} if asking != COUNT else body))
    waiting = asyncio.create_task(served.http.post(path, content=with_long))
    await is_read.wait()
    assert (await served.http.post(path, json=body)).status_code == 200
    assert not waiting.done()
    may_be_read.set()
    assert (await waiting).status_code == 200


async def test_clients_know_an_error_amid_a_stream(served: Served) -> None:
    served.generator.error = NodeLostError("worker 'pc' is gone")
    with pytest.raises(ollama.ResponseError, match="is gone"):
        [_ async for _ in await served.ollama.chat("demo", QUESTION, stream=True)]
    question: Any = QUESTION
    with pytest.raises(anthropic.APIStatusError, match="is gone"):
        async with served.anthropic.messages.stream(model="demo", messages=question, max_tokens=9) as stream:
            await stream.get_final_message()


@all_dialects
@whole_or_not
async def test_an_error_of_our_own_is_named_in_the_log_only(
    served: Served, asking: Asking, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    served.generator.error = RuntimeError("a secret path")
    path, body = asking
    answer = await served.http.post(path, json={**body, "stream": stream})
    assert "secret" not in answer.text
    number = caplog.records[-1].getMessage().split()[-1]
    assert number in answer.text
    assert answer.status_code == (200 if stream else 500)


@all_dialects
async def test_a_request_that_is_too_large_is_refused(
    served: Served, asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_body, "MOST_BODY_BYTES", 10)
    path, body = asking
    answer = await served.http.post(path, json=body)
    assert answer.status_code == 413
    assert "larger than" in message_in(answer.json())
    if asking == ANTHROPIC:
        assert answer.json()["error"]["type"] == "request_too_large"


@all_dialects
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer sesame"}, 200),
        ({"x-api-key": "sesame", "Authorization": ""}, 200),
        ({"Authorization": "Bearer guessed"}, 401),
        ({"Authorization": "sesame"}, 401),
        ({"x-api-key": "Bearer sesame", "Authorization": ""}, 401),
        ({"x-api-key": "", "Authorization": ""}, 401),
        ({"x-api-key": b"\xff\xe9", "Authorization": b"Bearer \xff\xe9"}, 401),
    ],
)
async def test_the_key_is_known_in_either_header(
    served: Served, asking: Asking, headers: Any, status: int
) -> None:
    path, body = asking
    answer = await served.http.post(path, json=body, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert "API key" in message_in(answer.json())


@all_dialects
async def test_pages_of_other_origins_may_not_ask(served: Served, asking: Asking) -> None:
    path, body = asking
    answer = await served.http.post(path, json=body, headers={"Origin": "https://example.org"})
    assert answer.status_code == 403
    assert "other origins" in message_in(answer.json())
    if asking == ANTHROPIC:
        assert answer.json()["error"]["type"] == "permission_error"


@all_dialects
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff"])
async def test_what_is_no_request_is_refused(served: Served, asking: Asking, body: bytes) -> None:
    answer = await served.http.post(asking[0], content=body)
    assert answer.status_code == 400
    assert message_in(answer.json())
