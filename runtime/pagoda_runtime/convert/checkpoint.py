"""Dequantizing the tensors of a GGUF file into safetensors shards."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from pagoda_runtime.convert.architectures import checkpoint_name, restore
from pagoda_runtime.convert.reader import GgufFile

MAX_SHARD_BYTES = 4 * 2**30


def write_weights(file: GgufFile, folder: Path, *, dtype: str) -> None:
    """Write model.safetensors, or shards of at most 4 GiB with their index."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    shards = _plan_shards(file, torch_dtype.itemsize)
    total_bytes = sum(_num_bytes(file, name, torch_dtype.itemsize) for s in shards for name in s)
    weight_map: dict[str, str] = {}
    written_bytes = 0
    for index, names in enumerate(shards):
        shard_name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        )
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            target = checkpoint_name(file, name)
            assert target is not None
            tensors[target] = _read_tensor(file, name).to(torch_dtype).contiguous()
            weight_map[target] = shard_name
            written_bytes += _num_bytes(file, name, torch_dtype.itemsize)
            _print_progress(written_bytes, total_bytes)
        save_file(tensors, folder / shard_name, metadata={"format": "pt"})
        # save_file leaves 0600; a server under another user must be able to read the folder.
        (folder / shard_name).chmod(0o644)
    if len(shards) > 1:
        index_json = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))


def _read_tensor(file: GgufFile, name: str) -> torch.Tensor:
    """One tensor as fp32, in the checkpoint's shape (GGUF lists dimensions in reverse)."""
    raw = file.tensors[name]
    values = gguf.quants.dequantize(raw.data, raw.tensor_type)
    values = values.reshape(tuple(int(size) for size in reversed(raw.shape)))
    return torch.from_numpy(np.array(restore(file, name, values), dtype=np.float32))


def _plan_shards(file: GgufFile, itemsize: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name in file.tensors:
        if checkpoint_name(file, name) is None:
            continue
        num_bytes = _num_bytes(file, name, itemsize)
        if shards[-1] and shard_bytes + num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += num_bytes
    return shards


def _num_bytes(file: GgufFile, name: str, itemsize: int) -> int:
    return int(file.tensors[name].n_elements) * itemsize


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
