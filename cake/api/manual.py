"""The API's description as a page for people, which a browser shows without running anything."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from cake.api.handlers import EVENTS, LINES

Json = Mapping[str, Any]
LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} long",
    "minItems": "at least {} of them",
    "maxItems": "at most {} of them",
}
PAGE = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title>Cake: the API</title>
  <link rel="icon" href="/page/cake.svg">
  <link rel="stylesheet" href="/page/style.css">
</head>
<body>
  <header>
    <h1><img src="/page/cake.svg" alt="" width="24" height="24"> Cake</h1>
    <p id="model">{model}</p>
    <nav aria-label="Views">
      <a href="/#chat">Chat</a>
      <a href="/#cluster">Cluster</a>
      <a href="/docs" aria-current="page">API</a>
    </nav>
  </header>
  <main id="manual">
{main}
  </main>
</body>
</html>
"""


def manual_of(described: Json) -> str:
    """The page, as HTML; `described` is such as `cake.api.openapi` makes."""
    schemas = described["components"]["schemas"]
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    groups = dict.fromkeys(operation["tags"][0] for _, operation in operations)
    with_key = "security" in described
    parts = [_introduction(with_key), _contents(operations)]
    for group in groups:
        shown = [_operation(*each, with_key) for each in operations if each[1]["tags"] == [group]]
        parts.append(f"<h2>{escape(group)}</h2>{''.join(shown)}")
    types = "".join(_type(name, schema) for name, schema in sorted(schemas.items()))
    parts.append(f"<h2>Types</h2>{types}")
    return PAGE.format(model=escape(schemas["ModelName"]["enum"][0]), main="\n".join(parts))


def _introduction(with_key: bool) -> str:
    key = (
        "With each request comes the API key, as <code>Authorization: Bearer</code> or as "
        "<code>x-api-key</code>. "
    )
    return (
        f"<p>{key if with_key else ''}Bodies and answers are JSON. Programs read all this at "
        '<a href="/openapi.json">/openapi.json</a>, in OpenAPI 3.1.</p>'
    )


def _contents(operations: Sequence[tuple[str, Json]]) -> str:
    links = (
        f'<li><a href="#{operation["operationId"]}"><code>{escape(name)}</code></a> '
        f"{_words(operation['summary'])}</li>"
        for name, operation in operations
    )
    return f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>'


def _operation(name: str, operation: Json, with_key: bool) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    asked = f"<p>Body: {_kind(body['schema'])}, such as {_example(body)}</p>" if body else ""
    key = "<p>Needs no key.</p>" if with_key and operation.get("security") == [] else ""
    answers = "".join(_answer(*each) for each in operation["responses"].items())
    return (
        f'<section id="{operation["operationId"]}"><h3><code>{escape(name)}</code></h3>'
        f"<p>{_words(operation['summary'])}</p>{key}{asked}<dl>{answers}</dl></section>"
    )


def _example(body: Json) -> str:
    return f"<code>{escape(json.dumps(body['example'], ensure_ascii=False))}</code>"


def _answer(status: str, answer: Json) -> str:
    kinds = [_content(media, content["schema"]) for media, content in answer["content"].items()]
    headers = "".join(f"; with <code>{escape(name)}</code>" for name in answer.get("headers", ()))
    return f"<dt>{status}</dt><dd>{_words(answer['description'])} {' or '.join(kinds)}{headers}</dd>"


def _content(media: str, schema: Json) -> str:
    if media == "application/json":
        return _kind(schema)
    kind = _kind(schema)
    if media == EVENTS:
        *_, of_json = schema["properties"]["data"]["anyOf"]
        kind = f"events, each {_kind(of_json['contentSchema'])}"
    if media == LINES:
        kind = f"lines, each {kind}"
    return f"{kind} (<code>{escape(media)}</code>)"


def _type(name: str, schema: Json) -> str:
    required = schema.get("required", ())
    fields = "".join(
        _field(field, kind, field in required) for field, kind in schema.get("properties", {}).items()
    )
    said = f"<p>{_words(schema['description'])}</p>" if "description" in schema else ""
    shown = f"<dl>{fields}</dl>" if fields else f"<p>{_kind(schema)}</p>"
    return f'<section id="type-{escape(name)}"><h3>{escape(name)}</h3>{said}{shown}</section>'


def _field(name: str, schema: Json, required: bool) -> str:
    default = schema.get("default")
    usual = "" if default is None else f"; <code>{escape(json.dumps(default))}</code> if not given"
    need = "; required" if required else usual
    said = f" {_words(schema['description'])}" if "description" in schema else ""
    return f"<dt><code>{escape(name)}</code></dt><dd><small>{_kind(schema)}{need}</small>{said}</dd>"


def _kind(schema: Json) -> str:
    """What a value may be, in words."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#type-{name}">{name}</a>'
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(map(_kind, schema[several])))
    if "enum" in schema or "const" in schema:
        return _one_of(schema.get("enum") or [schema["const"]])
    kind = escape(str(schema.get("type", "anything")))
    if kind == "array":
        item = _kind(schema.get("items", {}))
        kind = f"list of ({item})" if ", " in item else f"list of {item}"
    limits = [words.format(schema[limit]) for limit, words in LIMITS.items() if limit in schema]
    return ", ".join([kind, *limits])


def _one_of(values: Iterable[object]) -> str:
    return " or ".join(f"<code>{escape(str(value))}</code>" for value in values)


def _words(text: str) -> str:
    """A sentence in which backquotes mark code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
