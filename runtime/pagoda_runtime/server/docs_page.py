"""An OpenAPI document as one page of HTML: no script, and nothing from another host."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment

# The first macro tells a JSON schema in words, with links to the objects that it names.
_PAGE = """\
{%- macro type_of(schema) -%}
{%- if "$ref" in schema -%}
{%- set name = schema["$ref"].rpartition("/")[2] -%}
<a href="#{{ name }}">{{ name }}</a>
{%- elif "anyOf" in schema or "oneOf" in schema -%}
{%- for part in schema.anyOf or schema.oneOf -%}
{{ " or " if not loop.first }}{{ type_of(part) }}
{%- endfor -%}
{%- elif "const" in schema or "enum" in schema -%}
{%- for value in schema.enum or [schema.const] -%}
{{ " or " if not loop.first }}<code>{{ "%r" % value }}</code>
{%- endfor -%}
{%- elif schema.type == "array" -%}
list of {{ type_of(schema.get("items", {})) }}
{%- elif schema.additionalProperties is mapping -%}
object of {{ type_of(schema.additionalProperties) }}
{%- else -%}
{{ schema.type or "anything" }}
{%- for key, words in limits if key in schema %} {{ words }} {{ "%g" % schema[key] }}{% endfor -%}
{{ ". " ~ schema.description if schema.description }}
{%- endif -%}
{%- endmacro -%}
{%- macro row(name, content) -%}
<tr><th>{{ name }}</th><td>
{%- for kind, media in content.items() -%}
{{ "<br>"|safe if not loop.first }}<code>{{ kind }}</code> {{ type_of(media.schema) }}
{%- endfor -%}
</td></tr>
{%- endmacro -%}
<!doctype html><html lang="en"><meta charset="utf-8">
<title>{{ info.title }} {{ info.version }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
td, th { border-bottom: 1px solid #8886; padding: .2rem .6rem .2rem 0; text-align: left;
         vertical-align: top; }
h2 { margin-top: 2.5rem; } code { font-size: 90%; } :root { color-scheme: light dark; }
</style>
<h1>{{ info.title }} {{ info.version }}</h1>
<p>As a document for programs: <a href="openapi.json">openapi.json</a></p>
{% for path, operations in paths.items() %}{% for method, operation in operations.items() -%}
<h2><code>{{ method.upper() }} {{ path }}</code></h2><p>{{ operation.summary }}</p><table>
{%- if operation.requestBody %}{{ row("Body", operation.requestBody.content) }}{% endif -%}
{%- if operation.security -%}
<tr><th>Key</th><td><code>Authorization: Bearer KEY</code></td></tr>
{%- endif -%}
{%- for status, answer in operation.responses.items() -%}
{{ row(status ~ " " ~ answer.description, answer.content) }}
{%- endfor %}</table>
{% endfor %}{% endfor -%}
<h1>Objects</h1>
{% for name, schema in components.schemas|dictsort -%}
<h2 id="{{ name }}">{{ name }}</h2><p>{{ schema.description }}</p><table>
{%- for field, described in (schema.properties or {}).items() -%}
<tr><th><code>{{ field }}</code>{{ " (optional)" if field not in schema.required or [] }}</th>
<td>{{ type_of(described) }}</td></tr>
{%- endfor %}</table>
{% endfor -%}
</html>
"""
_LIMITS = (
    ("minimum", "from"),
    ("maximum", "to"),
    ("exclusiveMaximum", "below"),
    ("minLength", "of at least"),
    ("maxLength", "of at most"),
)


def render_page(document: dict[str, Any]) -> str:
    """The page of a document that `openapi.build_document` made."""
    return Environment(autoescape=True).from_string(_PAGE).render(document, limits=_LIMITS)
