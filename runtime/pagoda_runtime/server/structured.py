"""The form that a body wants its answer in, and the grammar for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

from pagoda_runtime.errors import RequestError
from pagoda_runtime.grammar.compiler import Grammars
from pagoda_runtime.grammar.forms import FORMS, json_grammar
from pagoda_runtime.grammar.vocabulary import light_vocabulary
from pagoda_runtime.ipc.messages import EngineReady
from pagoda_runtime.metrics import Metrics
from pagoda_runtime.sampling_params import MAX_GRAMMAR_CHARACTERS
from pagoda_runtime.server.protocol import GenerationRequest, ResponseFormat, StructuredOutputs
from pagoda_runtime.tokenizer.tokenizer import Tokenizer


class Structure(NamedTuple):
    """What an answer must be."""

    param: str
    """The field of the body that says so."""
    write: Callable[[], str]
    """The grammar; raises ValueError that says what is wrong with the field."""


def find_structure(body: GenerationRequest) -> Structure | None:
    """The one structure that a body asks for. Raises RequestError: several, or with beams."""
    found = [*_of_response_format(body.response_format), *_of_outputs(body.structured_outputs)]
    for name, form in FORMS.items():
        value = getattr(body, f"guided_{name}")
        if value is not None and value is not False and value not in ("", []):
            found.append(Structure(f"guided_{name}", partial(form, value)))
    if not found:
        return None
    first, *others = found
    if others:
        raise RequestError(
            f"{first.param} and {others[0].param} each say what the answer must be; leave one out.",
            param=others[0].param,
        )
    if getattr(body, "use_beam_search", None):
        raise RequestError(
            f"use_beam_search does not heed {first.param}; leave one of the two out.",
            param=first.param,
        )
    return first


# Fields of a response_format, with the type that reads each.
_PARTS = {
    "json_schema": "json_schema",
    "structures": "structural_tag",
    "triggers": "structural_tag",
}


def _of_response_format(wanted: ResponseFormat | None) -> list[Structure]:
    if wanted is None:
        return []
    for name, kind in _PARTS.items():
        if getattr(wanted, name) is not None and wanted.type != kind:
            param = f"response_format.{name}"
            raise RequestError(
                f"{param} goes with the type {kind}, and the type is {wanted.type}; leave it out.",
                param=param,
            )
    schema = None if wanted.json_schema is None else wanted.json_schema.json_schema
    if wanted.type == "json_schema" and schema is None:
        param = "response_format.json_schema.schema"
        raise RequestError(f"{param} is missing; it must be a JSON schema.", param=param)
    writers = {
        "json_object": partial(FORMS["json_object"], True),
        "json_schema": partial(json_grammar, schema),
        "structural_tag": partial(
            FORMS["structural_tag"], {"structures": wanted.structures, "triggers": wanted.triggers}
        ),
    }
    if wanted.type == "text":
        return []
    return [Structure("response_format", writers[wanted.type])]


def _verify_spaces(wanted: StructuredOutputs) -> None:
    """Raise RequestError for what says nothing of the answer: no JSON, or no space to describe."""
    for name in ("whitespace_pattern", "disable_any_whitespace"):
        if not getattr(wanted, name):
            continue
        param = f"structured_outputs.{name}"
        if wanted.json_schema is None and not wanted.json_object:
            raise RequestError(f"{param} goes with json or json_object; leave it out.", param=param)
        if name == "whitespace_pattern" and wanted.disable_any_whitespace:
            raise RequestError(
                f"{param} describes what disable_any_whitespace forbids; leave one out.",
                param=param,
            )


def _of_outputs(wanted: StructuredOutputs | None) -> list[Structure]:
    if wanted is None:
        return []
    _verify_spaces(wanted)

    def write_json(schema: Any) -> str:
        return json_grammar(
            schema,
            whitespace_pattern=wanted.whitespace_pattern,
            has_whitespace=not wanted.disable_any_whitespace,
        )

    forms = {**FORMS, "json": write_json, "json_object": lambda _: write_json({"type": "object"})}
    values = {**dict(wanted), "json": wanted.json_schema, "json_object": wanted.json_object or None}
    found = [
        Structure(f"structured_outputs.{name}", partial(form, values[name]))
        for name, form in forms.items()
        if values[name] is not None
    ]
    if not found:
        raise RequestError(
            f"structured_outputs asks for nothing; it must have one of {', '.join(FORMS)}.",
            param="structured_outputs",
        )
    return found


class Structures:
    """Writes and verifies grammars, off the event loop it belongs to.

    Args:
        loaded: the engine's facts and its tokenizer.
    """

    def __init__(
        self, loaded: Callable[[], tuple[EngineReady, Tokenizer]], metrics: Metrics
    ) -> None:
        self._loaded, self._metrics = loaded, metrics

    async def make_grammar(self, structure: Structure | None) -> str | None:
        """The grammar of a structure, which the engine will take.

        Raises: RequestError: it is none, or too large or slow; the message names the field.
        """
        if structure is None:
            return None
        started = time.monotonic()
        try:
            text = await asyncio.to_thread(structure.write)
            await self._verify(text)
        except (RequestError, ValueError) as error:
            self._metrics.grammar_failures.inc()
            message = f"{structure.param} {error}" if isinstance(error, ValueError) else str(error)
            raise RequestError(message, param=structure.param) from None
        finally:
            self._metrics.observe("grammar_compile_seconds", time.monotonic() - started)
        return text

    async def _verify(self, text: str) -> None:
        if len(text) > MAX_GRAMMAR_CHARACTERS:
            raise ValueError(
                f"makes a grammar of {len(text)} characters; at most {MAX_GRAMMAR_CHARACTERS} fit."
            )
        # Shielded, because others may wait for the same grammar.
        compiled = asyncio.shield(asyncio.wrap_future(self._grammars.compile(text)))
        try:
            await asyncio.wait_for(compiled, self._grammars.compile_seconds)
        except TimeoutError:
            raise self._grammars.too_slow() from None

    @cached_property
    def _grammars(self) -> Grammars:
        ready, tokenizer = self._loaded()
        return Grammars(
            lambda: tokenizer,
            vocab_size=ready.vocab_size,
            end_token_ids=ready.eos_token_ids,
            make_vocabulary=light_vocabulary,
        )
