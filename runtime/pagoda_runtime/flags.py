"""Types of flags' values, and flags whose defaults are those of a config's fields."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from math import inf
from typing import Any, NoReturn, TypeVar

from pagoda_runtime.config import EngineConfig, ServerConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.platforms import describe_default

DEFAULTS = {
    field.name: field.default
    for config in (EngineConfig, ServerConfig)
    for field in fields(config)
    if field.default is not MISSING
}
N = TypeVar("N", int, float)

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that raises FatalError InvalidFlags where argparse would exit."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise FatalError("InvalidFlags", f"{message}. See `{self.prog} --help`.")

    # argparse would leave what a subcommand does not know to the command above it.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse all. Raises FatalError InvalidFlags, with the flag that may be meant."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed, []


class Flags:
    """A group of flags that are fields of EngineConfig or ServerConfig.

    Args:
        defaults: of fields that have another one in this command.
    """

    def __init__(self, parser: argparse.ArgumentParser, title: str, **defaults: Any) -> None:
        self.group = parser.add_argument_group(title)
        self._defaults = {**DEFAULTS, **defaults}

    def add(self, *names: str, shown: str | None = None, **kwargs: Any) -> None:
        """Add the flag of the field that the first of names spells, as argparse does.

        Args:
            shown: stands for the default in the help; by default the default itself.
        """
        field = names[0].removeprefix("--").replace("-", "_")
        default = self._defaults[field]
        shown = shown or _show_default(field, default)
        if shown:
            kwargs["help"] += f" ({shown})"
        self.group.add_argument(*names, **{"default": default, **kwargs})


def _show_default(field: str, default: Any) -> str | None:
    if default is None:
        return describe_default(field)
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, float):
        return f"{default:g}"
    return None if default == () else str(default)


def number(
    kind: Callable[[str], N], holds: Callable[[N], bool], expected: str
) -> Callable[[str], N]:
    """A type for argparse: a number that holds."""

    def parse(text: str) -> N:
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")

    return parse


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type for argparse: an integer from low to high, both included."""
    if high is None:
        return number(int, lambda value: value >= low, f"an integer of at least {low}")
    return number(int, lambda value: low <= value <= high, f"an integer {low}–{high}")


seconds = number(float, lambda value: 0 <= value < inf, "a number of seconds, 0 or more")
positive_seconds = number(float, lambda value: 0 < value < inf, "a number of seconds above 0")
fraction = number(float, lambda value: 0 < value <= 1, "above 0 and at most 1")


def text_value(text: str) -> str:
    """A type for argparse: any text but the empty one."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty")
    return text


def texts(text: str) -> list[str]:
    """A type for argparse: any text but the empty one, or several as a JSON list."""
    if not text.startswith("["):
        return [text_value(text)]
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(v and isinstance(v, str) for v in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON list of texts")
    return values


def origins(text: str) -> list[str]:
    """A type for argparse: origins as browsers send them, or `*`; several as a JSON list."""
    values = texts(text)
    for value in values:
        if value != "*" and not _ORIGIN.fullmatch(value):
            raise argparse.ArgumentTypeError(
                f"{value!r} is not an origin such as https://example.org, without a path, nor *"
            )
    return values
