"""Frozen values from JSON, by the types of their fields: what `spec` is parsed with. Pure."""

from __future__ import annotations

import functools
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal

Part = dict[str, Any]
"""A part of a pod in Kubernetes' own form, which the CRD's schema has checked."""


class SpecError(Exception):
    """A field of the spec cannot be understood; the message begins with its path."""


def camel_case(name: str) -> str:
    """The name that the CRD gives to a field: `max_num_seqs` is `maxNumSeqs`."""
    # `from` is a word of Python's own; its field is `from_`.
    return re.sub(r"_([a-z0-9])", lambda match: match.group(1).upper(), name).rstrip("_")


def build(cls: type[Any], value: object, path: str) -> Any:
    """A dataclass from an object whose keys are its fields in camelCase.

    Args:
        path: of the value in the manifest, for the message of an error.
    Raises: SpecError.
    """
    if not isinstance(value, Mapping):
        raise SpecError(f"{path}: an object is needed, not {value!r}")
    known = _known_fields(cls)  # type: ignore[arg-type]  # a class can be hashed
    if unknown := sorted(set(value) - set(known)):
        raise SpecError(
            f"{path}.{unknown[0]}: this operator does not know the field; "
            "upgrade the operator, or remove the field"
        )
    arguments = {}
    for name, (fld, hint) in known.items():
        if name in value:
            arguments[fld.name] = _convert(hint, value[name], f"{path}.{name}")
        elif fld.default is MISSING and fld.default_factory is MISSING:
            raise SpecError(f"{path}.{name}: the field is required")
    return cls(**arguments)


@functools.cache
def _known_fields(cls: type[Any]) -> dict[str, tuple[Field[Any], Any]]:
    """The fields of a dataclass with their types, by their names in the CRD."""
    # Found out anew in each pass, this is a quarter of a busy operator.
    hints = typing.get_type_hints(cls)
    return {camel_case(fld.name): (fld, hints[fld.name]) for fld in fields(cls)}


def _convert(hint: Any, value: object, path: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if is_dataclass(option):
            return build(typing.cast(type[Any], option), value, path)
        if typing.get_origin(option) is Literal:
            words = typing.get_args(option)
            if value not in words:
                raise SpecError(f"{path}: {value!r} is none of {', '.join(words)}")
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list):
            (item_hint, _) = typing.get_args(option)
            return tuple(
                _convert(item_hint, item, f"{path}[{index}]") for index, item in enumerate(value)
            )
        if option == Part and isinstance(value, Mapping):
            return dict(value)
        # bool is a subclass of int, but true is no number of replicas.
        if type(value) is option:
            return value
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise SpecError(f"{path}: {wanted} is needed, not {value!r}")
