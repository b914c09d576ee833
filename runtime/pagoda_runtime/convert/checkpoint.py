"""Writing the tensors of a GGUF file into safetensors shards."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from pagoda_runtime.convert.architectures import checkpoint_name, restore
from pagoda_runtime.convert.reader import GgufFile
from pagoda_runtime.quantization.schemes import GGUF_TYPES

logger = logging.getLogger("pagoda.convert")

MAX_SHARD_BYTES = 4 * 2**30
_HEAD, _TABLE = "lm_head", "token_embd.weight"
_PLAIN = ("F32", "F16", "BF16")


class Tensor(NamedTuple):
    """One that is written."""

    source: str
    """Its name in the GGUF file."""
    name: str
    blocks: str | None
    """The type of the blocks that it stays in; None: it is dequantized."""
    num_bytes: int

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


def plan_tensors(file: GgufFile, *, dtype: str, keep_blocks: bool) -> list[Tensor]:
    """All that are written, in order.

    A tied table is written twice if its blocks are kept: for the vocabulary's product, and, as rows
    are looked up in it, in dtype.
    """
    itemsize = getattr(torch, dtype).itemsize
    tensors: list[Tensor] = []
    for source, raw in file.tensors.items():
        name = checkpoint_name(file, source)
        if name is None:
            continue
        kind, is_table = raw.tensor_type.name, source == _TABLE
        is_kept = keep_blocks and kind in GGUF_TYPES and len(raw.shape) == 2
        if not is_kept or is_table:
            tensors.append(Tensor(source, name, None, int(raw.n_elements) * itemsize))
        if is_kept and not (is_table and "output.weight" in file.tensors):
            module = _HEAD if is_table else name.rpartition(".")[0]
            tensors.append(Tensor(source, f"{module}.qweight", kind, int(raw.n_bytes)))
    if keep_blocks:
        _log_dequantized(file, tensors, dtype)
    return tensors


def _log_dequantized(file: GgufFile, tensors: Sequence[Tensor], dtype: str) -> None:
    plain = [file.tensors[t.source].tensor_type.name for t in tensors if t.blocks is None]
    kinds = Counter(kind for kind in plain if kind not in (*_PLAIN, *GGUF_TYPES))
    for kind, count in sorted(kinds.items()):
        logger.info("%d tensors in %s are dequantized to %s", count, kind, dtype)


def describe_blocks(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """What config.json says of the blocks, if some are kept."""
    types = {tensor.module: tensor.blocks for tensor in tensors if tensor.blocks}
    return {"quantization_config": {"quant_method": "gguf", "types": types}} if types else {}


def write_weights(file: GgufFile, tensors: Sequence[Tensor], folder: Path, *, dtype: str) -> None:
    """Write model.safetensors, or shards of at most 4 GiB with their index."""
    shards = _plan_shards(tensors)
    total_bytes = sum(tensor.num_bytes for tensor in tensors)
    weight_map: dict[str, str] = {}
    written_bytes = 0
    for index, planned in enumerate(shards):
        shard_name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        )
        held: dict[str, torch.Tensor] = {}
        for tensor in planned:
            held[tensor.name] = _read_tensor(file, tensor, getattr(torch, dtype))
            weight_map[tensor.name] = shard_name
            written_bytes += tensor.num_bytes
            _print_progress(written_bytes, total_bytes)
        save_file(held, folder / shard_name, metadata={"format": "pt"})
        # save_file leaves 0600; a server under another user must be able to read the folder.
        (folder / shard_name).chmod(0o644)
    if len(shards) > 1:
        index_json = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))


def _read_tensor(file: GgufFile, tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the checkpoint's shape, or [outputs, bytes] of blocks."""
    raw = file.tensors[tensor.source]
    if tensor.blocks:
        return torch.from_numpy(np.array(restore(file, tensor.source, raw.data)))
    values = gguf.quants.dequantize(raw.data, raw.tensor_type)
    # GGUF lists dimensions in reverse.
    values = values.reshape(tuple(int(size) for size in reversed(raw.shape)))
    wide = np.array(restore(file, tensor.source, values), dtype=np.float32)
    return torch.from_numpy(wide).to(dtype).contiguous()


def _plan_shards(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    shard_bytes = 0
    for tensor in tensors:
        if shards[-1] and shard_bytes + tensor.num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(tensor)
        shard_bytes += tensor.num_bytes
    return shards


def _print_progress(done_bytes: int, total_bytes: int) -> None:
    """A bar that redraws itself on a terminal, and one line at the end elsewhere."""
    if not sys.stderr.isatty() and done_bytes < total_bytes:
        return
    filled = 30 * done_bytes // total_bytes
    bar = "█" * filled + "·" * (30 - filled)
    end = "\n" if done_bytes == total_bytes else ""
    print(
        f"\rweights {bar} {done_bytes / 2**20:,.0f} of {total_bytes / 2**20:,.0f} MiB",
        end=end,
        file=sys.stderr,
        flush=True,
    )
