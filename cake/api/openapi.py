"""The API's description, in OpenAPI 3.1: made of what each endpoint says of itself, and of nothing else.

https://spec.openapis.org/oas/v3.1.1
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from cake import __version__
from cake.api.bodies import ModelName
from cake.api.handlers import EVENTS, LINES, About, Endpoint

Json = dict[str, Any]
PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "As OpenAI's clients bring their key."},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "As Anthropic's do."},
}
ERRORS = {
    400: "The request is not understood, asks for what is not supported, or does not fit the context.",
    401: "The API key is missing or wrong.",
    403: "A page of another origin asks, which may not.",
    404: "There is no such model.",
    413: "The request is too large.",
    415: "The request's body is no JSON.",
    421: "The server is not asked by a name of its own.",
    500: "An error of the server's own; its log says more.",
    503: "There is no room at the moment, a worker is lost, or the server is about to end.",
}
OF_ALL = (403, 421, 500)
OF_BODIES = (400, 404, 413, 415, 503)
SECONDS = {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}
SCHEME = {"description": "How to bring the key.", "schema": {"type": "string"}}
HEADERS = {401: {"WWW-Authenticate": SCHEME}, 503: {"Retry-After": SECONDS}}


class _Schemas(GenerateJsonSchema):
    """An answer has nothing that its type does not name; and a field's name needs no title."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def typed_dict_schema(self, schema: Any) -> Json:
        return {**super().typed_dict_schema(schema), "additionalProperties": False}


class _Types:
    """The JSON schemas of all types that endpoints name, each by its own name."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        wanted: dict[tuple[Any, JsonSchemaMode], TypeAdapter[Any]] = {}
        for endpoint in endpoints:
            about = endpoint.about
            answers = [about.answer, about.event, about.line, about.unready, about.error] if about else []
            wanted |= {(t, "serialization"): TypeAdapter(t) for t in answers if t is not None}
            if endpoint.body is not None:
                wanted[endpoint.body, "validation"] = TypeAdapter(endpoint.body)
        wanted[ModelName, "validation"] = TypeAdapter(ModelName)
        by_type, schemas = TypeAdapter.json_schemas(
            [(key, key[1], adapter) for key, adapter in wanted.items()],
            ref_template="#/components/schemas/{model}",
            schema_generator=_Schemas,
        )
        self._by_type: dict[Any, Json] = {key: _renamed(schema) for key, schema in by_type.items()}
        self.named: Json = {_name(name): _renamed(schema) for name, schema in schemas["$defs"].items()}

    def body(self, wanted: Any) -> Json:
        """Of what is sent to the server."""
        return self._by_type[(wanted, "validation"), "validation"]

    def answer(self, wanted: Any) -> Json:
        """Of what the server sends."""
        return self._by_type[(wanted, "serialization"), "serialization"]


def _name(name: str) -> str:
    """Where types of several modules have one name, pydantic puts their modules before it; we the dialect."""
    *modules, name = name.split("__")
    dialect = modules[2] if len(modules) > 3 else "openai"
    return name if dialect == "openai" else f"{dialect.title()}{name}"


def _renamed(node: Any) -> Any:
    if isinstance(node, list):
        return [_renamed(each) for each in node]
    if not isinstance(node, dict):
        return node
    if isinstance(node.get("$ref"), str):
        return {**node, **_ref(_name(node["$ref"].rpartition("/")[2]))}
    return {key: _renamed(value) for key, value in node.items()}


def openapi(endpoints: Sequence[Endpoint], model: str, with_key: bool) -> Json:
    """The description of a server that serves `model`, and wants a key or none."""
    types = _Types(endpoints)
    types.named["ModelName"] |= {"enum": [model], "description": "The model that is served."}
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        if endpoint.about is not None:
            path = PARAMETER.sub(r"{\1}", endpoint.path)
            operation = _operation(endpoint, endpoint.about, path, types, with_key)
            paths.setdefault(path, {})[endpoint.method.lower()] = operation
    described: Json = {
        "openapi": "3.1.1",
        "info": {
            "title": "Cake",
            "version": __version__,
            "summary": "A large language model, run across the devices you already own.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/", "description": "Where this description came from."}],
        "paths": paths,
        "components": {"schemas": types.named},
    }
    if with_key:
        described["components"]["securitySchemes"] = KEYS
        described["security"] = [{name: []} for name in KEYS]
    return described


def _operation(endpoint: Endpoint, about: About, path: str, types: _Types, with_key: bool) -> Json:
    name = re.sub(r"\W+", "_", f"{endpoint.method.lower()}{path}").strip("_")
    said: Json = {"operationId": name, "summary": about.summary, "tags": [about.group]}
    parameters = [
        {"name": parameter, "in": "path", "required": True, "schema": _ref("ModelName")}
        for parameter in PARAMETER.findall(endpoint.path)
    ]
    if parameters:
        said["parameters"] = parameters
    if endpoint.body is not None:
        content = {
            "application/json": {
                "schema": types.body(endpoint.body),
                "example": _example(endpoint.body, types),
            }
        }
        said["requestBody"] = {"required": True, "content": content}
    if not about.needs_key:
        said["security"] = []
    errors = {*OF_ALL, *about.errors, *(OF_BODIES if endpoint.body is not None else ())}
    if with_key and about.needs_key:
        errors.add(401)
    said_then = dict.fromkeys(sorted(errors), about.error)
    if about.unready is not None:
        said_then[503] = about.unready
    said["responses"] = {
        "200": {"description": "The answer.", "content": _content(about, types)},
        **{str(status): _error(status, types.answer(kind)) for status, kind in said_then.items()},
    }
    return said


def _example(body: type[BaseModel], types: _Types) -> Json:
    """What a request may bring: the model that is served, and what the body's fields say."""
    said = {name: field.examples[0] for name, field in body.model_fields.items() if field.examples}
    return {"model": types.named["ModelName"]["enum"][0], **said}


def _content(about: About, types: _Types) -> Json:
    content: Json = {}
    if about.answer is not None:
        content["application/json"] = {"schema": types.answer(about.answer)}
    if about.event is not None:
        content[EVENTS] = {"schema": _event(types.answer(about.event), about.last_event)}
    if about.line is not None:
        content[LINES] = {"schema": types.answer(about.line)}
    if about.text is not None:
        content[about.text] = {"schema": {"type": "string"}}
    return content


def _event(data: Json, last: str | None) -> Json:
    """Of each event, as OpenAPI has it: an object whose data is JSON, but for what ends the stream."""
    of_json = {"contentMediaType": "application/json", "contentSchema": data}
    kinds = [of_json] if last is None else [{"const": last}, of_json]
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string", "anyOf": kinds}},
    }


def _error(status: int, schema: Json) -> Json:
    headers = {"headers": HEADERS[status]} if status in HEADERS else {}
    content = {"application/json": {"schema": schema}}
    return {"description": ERRORS[status], **headers, "content": content}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
