"""An OpenAPI document as one page of HTML: no script, and nothing from another host."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

Json = dict[str, Any]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
td, th { border-bottom: 1px solid #8886; padding: .2rem .6rem .2rem 0; text-align: left;
         vertical-align: top; }
h2 { margin-top: 2.5rem; } code { font-size: 90%; } :root { color-scheme: light dark; }
"""


def render_page(document: Json) -> str:
    """The page of a document that `openapi.build_document` made."""
    info, schemas = document["info"], document["components"]["schemas"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    routes = "".join(
        _render_route(method, path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    models = "".join(_render_schema(name, schema) for name, schema in schemas.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        '<p>As a document for programs: <a href="openapi.json">openapi.json</a></p>'
        f"{routes}<h1>Objects</h1>{models}</html>"
    )


def _render_route(method: str, path: str, operation: Json) -> str:
    rows = []
    body = operation.get("requestBody")
    if body is not None:
        rows.append(("Body", _types_of(body["content"])))
    if operation.get("security"):
        rows.append(("Key", "<code>Authorization: Bearer KEY</code>"))
    for status, answer in operation["responses"].items():
        rows.append((f"{status} {escape(answer['description'])}", _types_of(answer["content"])))
    head = f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
    return f"{head}<p>{escape(operation['summary'])}</p>{_render_table(rows)}"


def _types_of(content: Json) -> str:
    return "<br>".join(
        f"<code>{escape(kind)}</code> {_type_of(media['schema'])}"
        for kind, media in content.items()
    )


def _render_schema(name: str, schema: Json) -> str:
    required = schema.get("required", ())
    rows = [
        (
            f"<code>{escape(field)}</code>{'' if field in required else ' (optional)'}",
            _type_of(described),
        )
        for field, described in schema.get("properties", {}).items()
    ]
    head = f'<h2 id="{escape(name)}">{escape(name)}</h2>'
    return f"{head}<p>{escape(schema.get('description', ''))}</p>{_render_table(rows)}"


def _render_table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in rows)
    return f"<table>{cells}</table>"


def _type_of(schema: Json) -> str:
    """A JSON schema in words, with links to the objects that it names."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(_type_of(part) for part in schema[key])
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(repr(value))}</code>" for value in values)
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type_of(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type_of(schema['additionalProperties'])}"
    limits = [f"{word} {schema[key]:g}" for key, word in _LIMITS.items() if key in schema]
    text = " ".join([escape(kind), *limits])
    return f"{text}. {escape(schema['description'])}" if "description" in schema else text


_LIMITS = {
    "minimum": "from",
    "maximum": "to",
    "exclusiveMaximum": "below",
    "minLength": "of at least",
    "maxLength": "of at most",
}
