"""The model of the demo in the layouts of quantized checkpoints, each written once.

Rounded to the nearest, and written from the descriptions of the formats with nothing of what reads
them here. Like the model itself they lie in the cache folder, each with a file beside it that tells
what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import model
import numpy
import torch
from safetensors.torch import load_file, save_file

GROUP_SIZE = 128
# The output of a word of AWQ that each of its eight fields has, the lowest first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]


def pack(numbers: torch.Tensor, order: Sequence[int] = range(8)) -> torch.Tensor:
    """[rows, n / 8] int32 of [rows, n]: eight numbers of 4 bits to a word, the lowest first."""
    fields = numbers.numpy().astype(numpy.uint32).reshape(len(numbers), -1, 8)[..., list(order)]
    words = numpy.bitwise_or.reduce(fields << numpy.arange(0, 32, 4, dtype=numpy.uint32), axis=2)
    return torch.from_numpy(words.view(numpy.int32))


def round_in_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers of 4 bits [outputs, inputs], and zeros and scales of groups [outputs, groups]."""
    groups = weight.float().unflatten(1, (-1, GROUP_SIZE))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / 15).half()
    # GPTQ stores zeros less one.
    zeros = (-low / scales).round().clamp(1, 15)
    integers = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return integers.flatten(1), zeros, scales


def write_awq(weight: torch.Tensor) -> Tensors:
    integers, zeros, scales = round_in_groups(weight)
    return {
        "qweight": pack(integers.T, AWQ_ORDER),
        "qzeros": pack(zeros.T, AWQ_ORDER),
        "scales": scales.T,
    }


def write_gptq(weight: torch.Tensor) -> Tensors:
    integers, zeros, scales = round_in_groups(weight)
    return {
        "qweight": pack(integers).T,
        "qzeros": pack(zeros.T - 1),
        "scales": scales.T,
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP_SIZE,
    }


def write_fp8(weight: torch.Tensor) -> Tensors:
    """Blocks of 128 outputs and 128 inputs, as Hugging Face's fine-grained FP8."""
    blocks = weight.float().unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    numbers = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)
    return {"weight": numbers.to(torch.float8_e4m3fn), "weight_scale_inv": scales}


INT4 = {"bits": 4, "group_size": GROUP_SIZE}
FORMATS: dict[str, tuple[dict[str, object], Callable[[torch.Tensor], Tensors]]] = {
    "awq": ({**INT4, "quant_method": "awq", "version": "gemm", "zero_point": True}, write_awq),
    "gptq": ({**INT4, "quant_method": "gptq", "desc_act": False, "sym": False}, write_gptq),
    "fp8": (
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
        write_fp8,
    ),
}
"""Format → its quantization_config, and what writes a matrix [outputs, inputs]"""


def ensure_quantized(name: str) -> Path:
    """The folder of the model in a format of FORMATS, written if it is missing or out of date."""
    source = model.ensure_model()
    folder = source.with_name(f"{source.name}-{name}")
    marker = model.marker_of(folder)
    key = hashlib.sha256(model.content_key().encode() + Path(__file__).read_bytes()).hexdigest()
    if folder.exists() and marker.exists() and marker.read_text() == key:
        return folder
    marker.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        shutil.copytree(source, made, ignore=shutil.ignore_patterns("*.safetensors"))
        quantize(source, made, name)
        os.rename(made, folder)
    marker.write_text(key)
    return folder


def quantize(source: Path, folder: Path, name: str) -> None:
    stored, write = FORMATS[name]
    tensors: Tensors = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if module.endswith("_proj"):
            tensors |= {
                f"{module}.{part}": made.contiguous() for part, made in write(tensor).items()
            }
        else:
            tensors[key] = tensor
    path = folder / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    # It is made for its owner alone, whom a pod does not run as.
    path.chmod(0o644)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
