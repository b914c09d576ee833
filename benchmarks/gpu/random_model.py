"""A checkpoint of a shape with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_tokenizer
from safetensors.torch import save_file

from gpu.shapes import SHAPES, model_config
from pagoda_kernels.launch import LaunchRecorder
from pagoda_runtime.models.registry import make_model
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.by_module import get_linear_method

_SHARD_BYTES = 4 << 30


def write_random_model(folder: Path, settings: Mapping[str, Any], device: torch.device) -> int:
    """Write Llama 3.1 8B with these settings in bf16; return the bytes a decode step reads."""
    shapes = _shapes_of_weights(settings)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)
    names: dict[str, str] = {}
    for number, shard in enumerate(_shards(shapes)):
        file = f"model-{number:05}.safetensors"
        tensors = {name: _random(shapes[name], "norm" in name, generator, device) for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(shard, file))
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    values = {**SHAPES["llama-3.1-8b"], **settings, "model_type": "llama", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(values))
    write_tokenizer(folder, values["vocab_size"])
    read = sum(shape.numel() for name, shape in shapes.items() if "embed_tokens" not in name)
    return read * torch.bfloat16.itemsize


def _shapes_of_weights(settings: Mapping[str, Any]) -> dict[str, torch.Size]:
    """By name in the checkpoint."""
    # Without data: 16 GB of it would only be thrown away.
    with LaunchRecorder():
        device, dtype = torch.device("cpu"), torch.bfloat16
        placement = Placement(dtype, device, get_linear_method(None))
        model = make_model(model_config("llama-3.1-8b", **settings), placement)
        return {name: torch.Size(shard.shape) for name, shard in model.weights().items()}


def _shards(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    names: list[str] = []
    num_bytes = 0
    for name, shape in shapes.items():
        names.append(name)
        num_bytes += shape.numel() * torch.bfloat16.itemsize
        if num_bytes >= _SHARD_BYTES:
            yield names
            names, num_bytes = [], 0
    if names:
        yield names


def _random(
    shape: torch.Size, is_norm: bool, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    return (1.0 + 0.1 * drawn if is_norm else 0.05 * drawn).cpu()
