"""What is known of a checkpoint's quantization, and the reading of the file that tells it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.errors import FatalError
from pagoda_runtime.quantization.schemes import WHOLE_ROW, Scheme


@dataclass(frozen=True, slots=True)
class Rule:
    """How the modules are stored whose names begin as a pattern says; None: unquantized."""

    pattern: re.Pattern[str]
    scheme: Scheme | None


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's matrices are stored, or are to be held."""

    method: str
    """As the flag --quantization calls it."""
    rules: tuple[Rule, ...]
    """The first that fits a module holds; if none does, it is unquantized."""
    kv_cache_dtype: str | None = None
    """What keys and values were quantized to when the checkpoint was made, if they were."""

    def scheme_of(self, module: str) -> Scheme | None:
        """Of a module by its name in the checkpoint."""
        return next((rule.scheme for rule in self.rules if rule.pattern.match(module)), None)


class QuantizationFile(ConfigFile):
    """The part of a config file that tells of the quantization; what is wrong is a mismatch."""

    def __init__(self, file: ConfigFile, values: Mapping[str, Any], prefix: str) -> None:
        super().__init__(file.path, values)
        self._prefix = prefix

    def part(self, key: str, beside: Mapping[str, Any] = MappingProxyType({})) -> QuantizationFile:
        """beside: values that hold where the part has none of its own."""
        values = {**beside, **self.mapping(key)}
        return QuantizationFile(self, values, f"{self._prefix}{key}.")

    def invalid(self, key: str, value: object, expected: str) -> FatalError:
        return FatalError(
            "QuantizationMismatch",
            f"{self.path}: {self._prefix}{key} is {value!r}; it must be {expected}. Serve another "
            "quantization of the model or its unquantized weights, or correct the file.",
        )

    def one_of(self, key: str, default: Any, choices: tuple[Any, ...]) -> Any:
        expected = f"one of {', '.join(map(str, choices))}"
        return self.read_value(key, default, lambda v: _is_among(v, choices), expected)

    def group_size(self, default: int | None = None) -> int:
        def holds(value: object) -> bool:
            return type(value) is int and (value > 0 or value == WHOLE_ROW)

        size: int = self.read_value("group_size", default, holds, "a positive integer or -1")
        return size

    def names(self, *keys: str) -> list[str]:
        """Of modules, under all of the keys."""
        found: list[str] = []
        for key in keys:
            names = self.values.get(key) or []
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise self.invalid(key, names, "a list of names")
            found += names
        return found

    def compile(self, key: str, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except re.error as error:
            raise self.invalid(key, pattern, f"a regular expression ({error})") from error


def everything(scheme: Scheme | None) -> Rule:
    return Rule(re.compile(""), scheme)


def unquantized(module: str) -> Rule:
    """Of modules in whose names this one stands, between dots or at an end."""
    return Rule(re.compile(rf"(.*\.)?{re.escape(module)}(\.|$)"), None)


def _is_among(value: object, choices: tuple[Any, ...]) -> bool:
    return any(type(value) is type(choice) and value == choice for choice in choices)
