"""Opening a GGUF file, and reading its fields with a type that is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from pagoda_runtime.errors import FatalError, unreadable


class _Reader(gguf.GGUFReader):
    """Names the tensor that does not fit its type or its file."""

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        for field in fields:
            _, name, _, dims, (kind,), (offset,) = field.parts
            try:
                block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            except ValueError as error:
                raise ValueError(f"tensor {bytes(name).decode()}: {error}") from error
            first = int(start_offs + offset)
            last = first + int(np.prod(dims)) // block_size * block_bytes
            if last > len(self.data) or dims[0] % block_size:
                raise ValueError(
                    f"tensor {bytes(name).decode()}, {dims.tolist()} in blocks of {block_size}, is "
                    f"said to be its bytes {first:,} to {last:,}; it has {len(self.data):,}"
                )
        super()._build_tensors(start_offs, fields)


class GgufFile:
    """A GGUF file that could be opened: its fields, and its memory-mapped tensors by name."""

    def __init__(self, path: Path, raw: gguf.GGUFReader) -> None:
        self.path = path
        self._fields = raw.fields
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in raw.tensors}

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture", required=True))

    def get(self, key: str, default: Any = None, *, required: bool = False) -> Any:
        """The value of a field; `{arch}` in the key stands for the file's architecture."""
        key = key.replace("{arch}", self.architecture) if "{arch}" in key else key
        if key in self._fields:
            return self._fields[key].contents()
        if required:
            raise FatalError("InvalidModelConfig", f"{self.path}: the field {key} is missing.")
        return default


def open_gguf(path: Path) -> GgufFile:
    """Open one GGUF file.

    Raises:
        FatalError: ModelNotFound, ModelAccessDenied, CorruptWeights, InvalidModelConfig (a part of
            a split file).
    """
    try:
        raw = _Reader(path)
    except FileNotFoundError as error:
        raise FatalError("ModelNotFound", f"{path}: no such file.") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # the reader raises whatever its numpy views raise
        message = f"{path} is not a whole GGUF file ({error}). Download it again."
        raise FatalError("CorruptWeights", message) from error
    file = GgufFile(path, raw)
    num_parts = file.get("split.count", 0)
    if num_parts > 1:
        raise FatalError(
            "InvalidModelConfig",
            f"{path} is one of {num_parts} parts; merge them into one file first "
            "(llama-gguf-split --merge).",
        )
    return file
