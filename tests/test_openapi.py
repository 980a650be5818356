"""The API's description: that it is one, of everything that is there, and that people can read it."""

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import httpx2
import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Route
from unloaded import client_of, unloaded_app

MODEL = "some <b>/model"
NO_OPERATIONS = {"/", "/favicon.ico", "/openapi.json", "/docs"}  # for people, and this itself
ERRORS = {"Ollama": "OllamaError", "Anthropic": "AnthropicError"}
WITHOUT_END = {"meta", "link", "img"}


async def answer_to(path: str, api_key: str | None = None) -> httpx2.Response:
    async with client_of(unloaded_app(MODEL, api_key)) as client:
        return await client.get(path)


async def described(api_key: str | None = None) -> Any:
    return (await answer_to("/openapi.json", api_key)).json()


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "$ref")
    if isinstance(node, dict | list):
        for each in node.values() if isinstance(node, dict) else node:
            yield from references(each)


async def test_every_route_for_programs_is_described() -> None:
    routes = [route for route in unloaded_app().routes if isinstance(route, Route)]
    there = {
        (route.path.replace(":path", ""), method.lower())
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
        if route.path not in NO_OPERATIONS
    }
    assert {(path, method) for path, method, _ in operations(await described())} == there


async def test_all_that_it_names_is_there_and_a_schema() -> None:
    document = await described()
    schemas = document["components"]["schemas"]
    assert set(references(document)) <= {f"#/components/schemas/{name}" for name in schemas}
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    assert not [name for name in schemas if "__" in name]
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    assert schemas["ModelName"]["enum"] == [MODEL]
    stop = schemas["ChatRequest"]["properties"]["stop"]
    assert stop["description"] == "Texts before which the answer ends."


async def test_streams_are_declared_with_the_type_of_their_events() -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        content = (await described())["paths"][path]["post"]["responses"]["200"]["content"]
        assert content.keys() == {"application/json", "text/event-stream"}
        done, event = content["text/event-stream"]["schema"]["properties"]["data"]["anyOf"]
        assert done == {"const": "[DONE]"}
        assert "ErrorAnswer" in str(event["contentSchema"])


async def test_each_body_has_an_example_that_people_see() -> None:
    document, shown = await described(), Shown((await answer_to("/docs")).text)
    for _, method, operation in operations(document):
        if method == "post":
            body = operation["requestBody"]["content"]["application/json"]
            whole = {**body["schema"], "components": document["components"]}
            Draft202012Validator(whole).validate(body["example"])
            assert body["example"]["model"] == MODEL
            assert json.dumps(body["example"]) in shown.text


@pytest.mark.parametrize("key", [None, "sesame"])
async def test_a_key_is_asked_for_where_there_is_one(key: str | None) -> None:
    document = await described(key)
    assert ("security" in document) == (key is not None)
    for path, _, operation in operations(document):
        assert ("401" in operation["responses"]) == (key is not None and not path.startswith("/health"))


async def test_every_error_has_its_dialects_shape_and_no_room_says_when_to_come_back() -> None:
    for path, method, operation in operations(await described()):
        answers = operation["responses"]
        assert {"403", "421", "500"} <= answers.keys()
        assert ({"400", "404", "413", "415", "503"} <= answers.keys()) or method == "get"
        for status, answer in answers.items():
            if status != "200":
                schema = answer["content"]["application/json"]["schema"]
                (group,) = operation["tags"]
                is_no_error = (path.startswith("/health"), status) == (True, "503")
                wanted = "Health" if is_no_error else ERRORS.get(group, "ErrorAnswer")
                assert schema == {"$ref": f"#/components/schemas/{wanted}"}
            if status == "503":
                assert "Retry-After" in answer["headers"]


class Shown(HTMLParser):
    """What a page holds; its tags must be closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open += [] if tag in WITHOUT_END else [tag]
        for name, value in attrs:
            assert name not in {"style", "onclick"}, "the page's own policy forbids it"
            self.ids += [str(value)] if name == "id" else []
            self.links += [str(value)] if name in {"href", "src"} else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_people_can_read_it_without_anything_being_run() -> None:
    answer = await answer_to("/docs", "sesame")
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    shown = Shown(answer.text)
    assert shown.open == []
    assert not shown.tags & {"script", "style", "b"}
    assert len(set(shown.ids)) == len(shown.ids)
    assert all(link.removeprefix("#") in shown.ids for link in shown.links if link.startswith("#"))
    assert not [link for link in shown.links if not link.startswith(("#", "/"))]
    assert MODEL in shown.text
    document = await described("sesame")
    for path, method, operation in operations(document):
        assert f"{method.upper()} {path}" in shown.text
        assert operation["operationId"] in shown.ids
    for name, schema in document["components"]["schemas"].items():
        assert f"type-{name}" in shown.ids
        assert all(field in shown.text for field in schema.get("properties", {}))
