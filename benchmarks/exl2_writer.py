"""Real weights in EXL2's layout, rounded to the nearest: its own quantizer needs a GPU.

Written from the layout's description, with nothing of what reads it here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP_SIZE = 32
BITS = (5, 4)
"""Of the half of the inputs whose columns are the largest, and of the others."""


def write_exl2_folder(model: Path, out: Path, plain: Path) -> None:
    """out: the layers' matrices in EXL2; plain: the same weights in fp32."""
    tensors = load_file(model / "model.safetensors")
    widened = {name: tensor.float() for name, tensor in tensors.items()}
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors.pop(name).float()
        stored, widened[name] = write_matrix(weight)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{key}": tensor for key, tensor in stored.items()}
    config = json.loads((model / "config.json").read_text())
    method = {"quantization_config": {"quant_method": "exl2", "bits": sum(BITS) / 2}}
    for folder, weights, extra in ((out, tensors, method), (plain, widened, {})):
        shutil.copytree(model, folder, dirs_exist_ok=True)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**config, **extra}))


def write_matrix(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """EXL2's tensors of a matrix, and what they stand for: [outputs, inputs] fp32."""
    inputs = weight.shape[1]
    order = weight.square().sum(0).argsort(descending=True)
    words, places, indexes, largest = [], [], [], []
    widened = torch.empty_like(weight)
    for number, own in enumerate(order.split(GROUP_SIZE)):
        bits = BITS[0] if number * GROUP_SIZE < inputs // 2 else BITS[1]
        middle = 2 ** (bits - 1)
        columns = weight[:, own]
        wanted = columns.abs().amax(1) / (middle - 0.5)
        top = wanted.max().half()
        index = ((wanted / top.float() * 256).sqrt().round() - 1).clamp(0, 15)
        scales = ((index + 1) ** 2 * top.float() / 256)[:, None]
        integers = (columns / scales).round().clamp(-middle, middle - 1)
        widened[:, own] = integers * scales
        places += [bits, sum(len(some) for some in words)]
        words.append(stream(integers + middle, bits).T)
        indexes.append(index)
        largest.append(top)
    tensors = {
        "q_weight": torch.cat(words).contiguous(),
        "q_groups": torch.tensor(places, dtype=torch.int16),
        "q_scale": stream(torch.stack(indexes), 4),
        "q_scale_max": torch.stack(largest),
        "q_invperm": order.argsort().int(),
    }
    return tensors, widened


def stream(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, n * bits / 32] int32: the numbers of each row as a stream of bits, lowest first."""
    blocks = numbers.long().unflatten(1, (-1, 32))
    words = blocks.new_zeros(*blocks.shape[:2], bits)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        words[..., word] |= blocks[..., place] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= blocks[..., place] >> 32 - shift
    return words.flatten(1).to(torch.int32)
