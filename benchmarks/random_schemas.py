"""JSON schemas made at random, of every keyword that can be served, whose answers end soon; and a
server's answers to them.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import jsonschema

Schema = dict[str, Any]

NUM_CHOICES = 4
_NUM_AT_ONCE = 16

_FORMATS = (
    "date-time",
    *("time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
)
_NAMES = ("a", "b", "name", "größe", 'quo"te', "x y", "id", "値")
_PATTERNS = (
    r"^[a-z]{1,4}$",
    r"^\d{2}-\d{2}$",
    r"^(foo|bar)[0-9]?$",
    r"^[^\"]{0,3}$",
    r"^x*y{1,2}$",
)
_VALUES: tuple[Any, ...] = (
    0,
    -1,
    2.5,
    "",
    "a",
    "é",
    'say "hi"',
    True,
    False,
    None,
    [],
    [1, "b"],
    {},
    {"k": [None]},
)


class SchemaMaker:
    """Makes a schema for each seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.definitions: dict[str, Schema] = {}

    def make(self) -> Schema:
        root = self.random.choice((self._object, self._object, self._array, self._any_of))(2)
        return {**root, **({"$defs": self.definitions} if self.definitions else {})}

    def _schema(self, depth: int) -> Schema:
        kinds: list[Callable[[int], Schema]] = [
            *(self._string, self._integer, self._number, self._plain, self._enum, self._format)
        ]
        if depth:
            kinds += [
                self._object,
                self._array,
                self._any_of,
                self._one_of,
                self._all_of,
                self._ref,
            ]
            kinds += [self._map, self._object]
        return self.random.choice(kinds)(depth - 1)

    def _string(self, depth: int) -> Schema:
        if self.random.random() < 0.4:
            return {
                "type": "string",
                "pattern": self.random.choice(_PATTERNS),
            }
        least = self.random.randint(0, 3)
        return {
            "type": "string",
            "minLength": least,
            "maxLength": least + self.random.randint(0, 5),
        }

    def _format(self, depth: int) -> Schema:
        return {"type": "string", "format": self.random.choice(_FORMATS)}

    def _integer(self, depth: int) -> Schema:
        low = self.random.randint(-200, 200)
        high = low + self.random.randint(8, 300)
        schema: Schema = {"type": "integer"}
        schema |= self.random.choice(
            ({"minimum": low, "maximum": high}, {"exclusiveMinimum": low, "exclusiveMaximum": high})
        )
        if self.random.random() < 0.3:
            schema["multipleOf"] = self.random.choice((2, 3, 7))
        return schema

    def _number(self, depth: int) -> Schema:
        low = self.random.randint(-50, 50)
        high = low + self.random.choice((1, 10, 1000))
        schema: Schema = {"type": "number", "minimum": low}
        schema[self.random.choice(("maximum", "exclusiveMaximum"))] = high
        if self.random.random() < 0.3:
            schema["multipleOf"] = 0.5
        return schema

    def _plain(self, depth: int) -> Schema:
        kinds = self.random.choice(("boolean", "null", ["boolean", "null"]))
        return {"type": kinds}

    def _enum(self, depth: int) -> Schema:
        if self.random.random() < 0.3:
            return {"const": self.random.choice(_VALUES)}
        return {"enum": self.random.sample(_VALUES, self.random.randint(1, 5))}

    def _array(self, depth: int) -> Schema:
        least = self.random.randint(0, 2)
        schema: Schema = {"type": "array", "minItems": least}
        if self.random.random() < 0.4:
            prefix = [self._schema(depth) for _ in range(self.random.randint(1, 2))]
            schema |= {
                "prefixItems": prefix,
                "items": self.random.choice((False, {"type": "null"})),
            }
            if schema["items"] is False:
                schema["minItems"] = min(least, len(prefix))
        else:
            schema["items"] = self._schema(depth)
        schema["maxItems"] = schema["minItems"] + self.random.randint(0, 2)
        return schema

    def _object(self, depth: int) -> Schema:
        names = self.random.sample(_NAMES, self.random.randint(0, 3))
        properties = {name: self._schema(depth) for name in names}
        required = [name for name in names if self.random.random() < 0.6]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    def _map(self, depth: int) -> Schema:
        values = self._schema(depth)
        schema: Schema = {"type": "object", "minProperties": self.random.randint(0, 1)}
        schema["maxProperties"] = schema["minProperties"] + self.random.randint(0, 2)
        if self.random.random() < 0.5:
            return {**schema, "additionalProperties": values}
        patterns = {"^n[0-9]{1,2}$": values}
        return {**schema, "patternProperties": patterns, "additionalProperties": False}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._schema(depth) for _ in range(self.random.randint(1, 3))]}

    def _one_of(self, depth: int) -> Schema:
        return {"oneOf": [self._integer(0), self._string(0), {"type": "null"}]}

    def _all_of(self, depth: int) -> Schema:
        low = self.random.randint(-20, 0)
        first = {"type": "integer", "minimum": low}
        return {"allOf": [first, {"maximum": low + self.random.randint(5, 50)}]}

    def _ref(self, depth: int) -> Schema:
        name = f"d{len(self.definitions)}"
        self.definitions[name] = {}
        self.definitions[name] = self._schema(depth)
        return {"$ref": f"#/$defs/{name}"}


@dataclass(slots=True)
class Tally:
    """What became of some schemas' answers."""

    num_valid: int = 0
    num_cut: int = 0
    """Answers that max_tokens ended."""
    refused: list[str] = field(default_factory=list)
    """Messages, one for each schema that is not served."""
    wrong: list[str] = field(default_factory=list)
    """Finished answers that do not fit, with schema and reason."""
    unfinished: list[Schema] = field(default_factory=list)
    """Schemas of which no answer ended."""


async def ask_for(url: str, schemas: Sequence[Schema], *, max_tokens: int) -> Tally:
    """NUM_CHOICES answers to each schema at temperature 1, streamed for every second one."""
    tally, places = Tally(), asyncio.Semaphore(_NUM_AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:

        async def ask(number: int, schema: Schema) -> None:
            body = {"prompt": f"Answer {number}:", "max_tokens": max_tokens, "seed": number}
            body |= {"n": NUM_CHOICES, "temperature": 1.0, "stream": number % 2 == 1}
            wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
            async with places:
                answer = await http.post(
                    "/v1/completions", json={**body, "response_format": wanted}
                )
            _count(tally, schema, answer)

        await asyncio.gather(*(ask(number, schema) for number, schema in enumerate(schemas)))
    return tally


def _count(tally: Tally, schema: Schema, answer: httpx.Response) -> None:
    if answer.status_code == 400:
        tally.refused.append(answer.json()["error"]["message"])
        return
    assert answer.status_code == 200, answer.text
    texts, reasons = [""] * NUM_CHOICES, [""] * NUM_CHOICES
    for choice in _choices(answer):
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"] or ""
    tally.num_cut += reasons.count("length")
    if "stop" not in reasons:
        tally.unfinished.append(schema)
    for text, reason in zip(texts, reasons, strict=True):
        assert reason in ("stop", "length"), answer.text
        if reason == "stop":
            problem = _find_problem(schema, text)
            tally.num_valid += problem is None
            if problem is not None:
                tally.wrong.append(f"{text!r} for {json.dumps(schema)}: {problem}")


def _choices(answer: httpx.Response) -> list[dict[str, Any]]:
    if not answer.headers["content-type"].startswith("text/event-stream"):
        choices: list[dict[str, Any]] = answer.json()["choices"]
        return choices
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]


def _find_problem(schema: Schema, text: str) -> str | None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
    try:
        validator.validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(getattr(error, "message", error))
    return None
