"""A JSON object on disk, read with types."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pagoda_runtime.errors import FatalError, unreadable


class ConfigFile:
    """A JSON object on disk, read with types; every error names file, key and value."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Raises FatalError: ModelNotFound, ModelAccessDenied or InvalidModelConfig."""
        text = read_text(path)
        if text is None:
            raise FatalError(
                "ModelNotFound",
                f"{path} does not exist. The model must be a folder in Hugging Face layout: "
                "config.json, tokenizer.json and *.safetensors.",
            )
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FatalError(
                "InvalidModelConfig",
                f"{path} is not valid JSON: {error}. Copy or download the file again.",
            ) from error
        if not isinstance(values, dict):
            raise FatalError("InvalidModelConfig", f"{path} must contain a JSON object.")
        return cls(path, values)

    @classmethod
    def read_optional(cls, path: Path) -> ConfigFile:
        """One that need not be there. Raises FatalError as `read`."""
        return cls.read(path) if path.exists() else cls(path, {})

    def invalid(self, key: str, value: object, expected: str) -> FatalError:
        return FatalError(
            "InvalidModelConfig",
            f"{self.path}: {key} is {value!r}; it must be {expected}. "
            "Correct the file, or download the model again.",
        )

    def read_value(
        self, key: str, default: Any, holds: Callable[[Any], bool], expected: str
    ) -> Any:
        """A value that holds, or the default; with a default of None the key is required."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not holds(value):
            raise self.invalid(key, value, expected)
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; without a default the key is required."""
        return self.read_value(key, default, _is_positive_integer, "a positive integer")

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; without a default the key is required."""
        return float(self.read_value(key, default, is_positive, "a positive number"))

    def boolean(self, key: str, default: bool) -> bool:
        return self.read_value(key, default, lambda v: isinstance(v, bool), "true or false")

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        return self.read_value(key, default, choices.__contains__, f"one of {', '.join(choices)}")

    def mapping(self, key: str) -> Mapping[str, Any]:
        return self.read_value(key, {}, lambda v: isinstance(v, dict), "an object")

    def require_absent(self, *keys: str) -> None:
        """Refuse settings that change the result and that this engine does not compute."""
        for key in keys:
            if self.values.get(key):
                raise self.invalid(key, self.values[key], "absent: this engine does not support it")


def read_text(path: Path) -> str | None:
    """None if there is no such file. Raises: FatalError: ModelAccessDenied, InvalidModelConfig."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise FatalError(
            "InvalidModelConfig", f"{path} is not UTF-8 text: {error}. Copy the file again."
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_positive(value: object) -> bool:
    return is_number(value) and 0 < value < math.inf  # type: ignore[operator]


def _is_positive_integer(value: object) -> bool:
    return is_positive(value) and isinstance(value, int)
