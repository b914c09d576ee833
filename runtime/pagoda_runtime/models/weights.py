"""Stream safetensors files into a model, and account for every tensor."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pagoda_runtime.config import SUPPORTED_DTYPES
from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.errors import FatalError, unreadable
from pagoda_runtime.models.config import DTYPE_OF_WEIGHTS, ModelConfig
from pagoda_runtime.models.download import OnProgress
from pagoda_runtime.quantization.parameter import Shard, StoredTensor, WrongDtypeError

logger = logging.getLogger(__name__)

KV_SCALES = (".k_scale", ".v_scale")
"""Last parts of the names of a whole layer's scales, which some exporters store."""
_OTHER_NAMES = {"weight_scale_inv": "weight_scale", "activation_scale": "input_scale"}
_NAMES_SHOWN = 4


def settle_by_weights(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config with what config.json leaves to the weights, or says against them.

    Without a dtype there the weights' own is taken. A head that is said to be tied to the table of
    embeddings, but lies in the checkpoint with other values or quantized, is used: the model was
    made so.

    Raises: FatalError: as load_weights, for files that are missing or damaged.
    """
    table, head = map(config.stored_name, ("embed_tokens.weight", "lm_head.weight"))
    wanted, part = (table, head), slice(None)
    if config.pooler is not None:
        if config.dtype != DTYPE_OF_WEIGHTS:
            return config
        # Of such a model nothing but the dtype is asked.
        wanted, part = (table, config.prefix + table), slice(1)
    stored = {
        name: piece[part]
        for path in find_weight_files(folder)
        for name, piece in read_tensors(path, wanted)
    }
    if config.dtype == DTYPE_OF_WEIGHTS:
        names = [str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()]
        dtype = next((name for name in names if name in SUPPORTED_DTYPES), "float32")
        logger.info("config.json names no dtype; the weights are %s", dtype)
        config = replace(config, dtype=dtype)
    if config.pooler is not None:
        return config
    if config.tie_word_embeddings and _has_quantized_head(config, folder):
        if config.quantization and config.quantization.method == "gguf":
            # It is the table itself.
            return replace(config, has_tied_head=True)
        logger.info("The checkpoint has a quantized matrix for the vocabulary; it is used.")
        config = replace(config, tie_word_embeddings=False)
    if config.tie_word_embeddings and len(stored) == 2 and not _are_equal(*stored.values()):
        logger.warning(
            "config.json says tie_word_embeddings, but %s in %s differs from %s, so it is used. "
            "Set tie_word_embeddings to false there.",
            head,
            folder,
            table,
        )
        config = replace(config, tie_word_embeddings=False)
    return config


def _has_quantized_head(config: ModelConfig, folder: Path) -> bool:
    head = config.stored_name("lm_head")
    if config.quantization is None or config.quantization.scheme_of(head) is None:
        return False
    names = (name for path in find_weight_files(folder) for name, _ in read_tensors(path))
    return any(name.startswith(f"{head}.") and name != f"{head}.weight" for name in names)


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype:
        one, other = one.float(), other.float()
    return torch.equal(one, other)


def load_weights(
    shards: Mapping[str, Shard],
    folder: Path,
    *,
    unused: Sequence[str] = (),
    prefix: str = "",
    fused: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    on_progress: OnProgress,
) -> int:
    """Give each tensor of a checkpoint to what it fills; return the bytes that were asked for.

    Of a tensor that ranks divide only this rank's share is.

    Args:
        shards: by name in the checkpoint.
        folder: has model.safetensors, or model.safetensors.index.json and the files it names.
        unused: last parts of the names of what may be present and is not needed.
        prefix: what all names may begin with.
        fused: part of a name → what lies in such a tensor one after the other, in equal parts.
    Raises: FatalError: ModelNotFound if there are no weights; ModelAccessDenied; CorruptWeights
        if a file is damaged, or one message with all tensors that are missing, unexpected,
        mis-shaped or stored twice.
    """
    kinds = "missing", "unexpected", "mis-shaped", "of another dtype", "twice"
    faults: dict[str, list[str]] = {kind: [] for kind in kinds}
    seen, num_scales = set[str](), 0
    files = find_weight_files(folder)
    progress = _Progress(sum(_file_bytes(path) for path in files), on_progress)
    for path in files:
        for name, stored in _read_parts(path, prefix, fused):
            name = name if name in shards else _other_name(name)
            shard = shards.get(name)
            if shard is None:
                num_scales += name.endswith(KV_SCALES)
                if not name.endswith((*KV_SCALES, *unused)):
                    faults["unexpected"].append(name)
                continue
            try:
                piece = _load(name, shard, stored, is_known=name in seen)
            except _FaultError as error:
                faults[error.kind].append(str(error))
            else:
                progress.add(piece, math.prod(stored.get_shape()) * piece.itemsize)
            seen.add(name)
    needed = (name for name, shard in shards.items() if not shard.parameter.is_optional)
    faults["missing"] += [name for name in needed if name not in seen]
    _raise_faults(folder, faults)
    if num_scales:
        logger.info(_UNUSED_SCALES, num_scales, ", ".join(KV_SCALES))
    return progress.bytes_read


class _Progress:
    """What is loaded of all files, and how fast."""

    def __init__(self, bytes_total: int, report: OnProgress) -> None:
        self.bytes_read = 0
        self._bytes_done, self._bytes_total = 0, bytes_total
        self._report, self._started_seconds = report, time.monotonic()

    def add(self, piece: torch.Tensor, num_bytes: int) -> None:
        """piece: this rank's; num_bytes: of the whole tensor."""
        self.bytes_read += piece.nbytes
        self._bytes_done += num_bytes
        speed = self.bytes_read / max(time.monotonic() - self._started_seconds, 1e-9)
        whole = max(self._bytes_total, self._bytes_done)
        self._report("load", 100.0 * self._bytes_done / whole, speed)


_UNUSED_SCALES = (
    "%d scales of keys and values in the checkpoint (%s) are not used: where --kv-cache-dtype asks "
    "for 8 bits, each head of a token has its own."
)


def _read_parts(
    path: Path, prefix: str, fused: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a file by the names that a model has for them."""
    for name, stored in read_tensors(path):
        name = name.removeprefix(prefix)
        parts = name.split(".")
        whole = next((part for part in parts if part in fused), None)
        if whole is None:
            yield name, stored
            continue
        names, num_rows = fused[whole], stored.get_shape()[0]
        for number, each in enumerate(names):
            rows = range(num_rows)[number * num_rows // len(names) :][: num_rows // len(names)]
            own = [each if part == whole else part for part in parts]
            yield ".".join(own), _Rows(stored, rows)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of a tensor in its file."""

    stored: StoredTensor
    rows: range

    def get_shape(self) -> list[int]:
        return [len(self.rows), *self.stored.get_shape()[1:]]

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        first, *others = (slice(None),) if index is ... else index
        own = self.rows[first]
        return self.stored[(slice(own.start, own.stop), *others)]


class _FaultError(Exception):
    """A tensor that is not loaded; the text names it."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def _load(name: str, shard: Shard, stored: StoredTensor, *, is_known: bool) -> torch.Tensor:
    """This rank's share. Raises: _FaultError."""
    if is_known:
        raise _FaultError("twice", name)
    shape = tuple(stored.get_shape())
    if not shard.fits(shape):
        expected = f"{list(shape)} instead of {list(shard.shape)}"
        raise _FaultError("mis-shaped", f"{name} ({expected})")
    try:
        return shard.load(stored)
    except WrongDtypeError as error:
        raise _FaultError("of another dtype", f"{name} ({error})") from error


def _other_name(name: str) -> str:
    """What a tensor is called that some tools call otherwise; both are multiplied by."""
    module, _, last = name.rpartition(".")
    return f"{module}.{_OTHER_NAMES.get(last, last)}" if module else name


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, each once, in a fixed order."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists() or not index.exists():
        if not single.exists():
            raise FatalError(
                "ModelNotFound",
                f"{folder} has neither model.safetensors nor model.safetensors.index.json. "
                "Convert the weights to safetensors, or check model.uri.",
            )
        return [single]
    file = ConfigFile.read(index)
    weight_map = file.mapping("weight_map")
    if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise file.invalid("weight_map", weight_map, "an object of tensor names and file names")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for path in files:
        if path.parent != folder or not path.exists():
            raise FatalError(
                "CorruptWeights",
                f"{path} does not exist, but {index} names it. Download the model again.",
            )
    return files


def read_tensors(
    path: Path, names: Collection[str] | None = None
) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of one file in the order in which they lie there.

    Args:
        names: those that are wanted, if they are there; None: all.
    """
    try:
        # safetensors says of a file that may not be read that it does not exist.
        path.open("rb").close()
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                if names is None or name in names:
                    yield name, file.get_slice(name)
    except (PermissionError, IsADirectoryError) as error:
        raise unreadable(path, error) from error
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise FatalError(
            "CorruptWeights",
            f"{path} is truncated or damaged: {error}. Copy or download the file again.",
        ) from error


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _raise_faults(folder: Path, faults: Mapping[str, list[str]]) -> None:
    parts = []
    for kind, names in faults.items():
        if names:
            shown = ", ".join(names[:_NAMES_SHOWN])
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            parts.append(f"{len(names)} {kind}: {shown}{more}")
    if parts:
        raise FatalError(
            "CorruptWeights",
            f"The weights in {folder} do not fit its config.json: {'; '.join(parts)}. "
            "Download the model again, or correct config.json.",
        )
