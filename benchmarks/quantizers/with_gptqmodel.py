"""Quantize a model folder by gptqmodel, in an environment of its own: see quant_real.py.

    python with_gptqmodel.py KIND MODEL CALIBRATION OUT

CALIBRATION is a JSON file of lists of token ids. OUT becomes the quantized folder, OUT.plain one
with the weights in fp32 that gptqmodel itself multiplies by when it has loaded OUT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Before it is imported: on two processors it would start one worker where it needs two, and
# compile what runs once.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.models.definitions.gemma3 import Gemma3QModel
from gptqmodel.models.definitions.llama import LlamaQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.awq.quantize import scale
from gptqmodel.quantization.config import FORMAT, AWQConfig, GPTQConfig
from safetensors.torch import load_file, save_file
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3RotaryEmbedding

COMMON = {"bits": 4, "group_size": 128, "offload_to_disk": False}
CONFIGS = {
    "gptq": lambda: GPTQConfig(**COMMON),
    "gptq_desc_act": lambda: GPTQConfig(**COMMON, desc_act=True, sym=False, format=FORMAT.GPTQ_V2),
    "gptq_8": lambda: GPTQConfig(**COMMON | {"bits": 8, "group_size": -1}, act_group_aware=False),
    "gptq_3": lambda: GPTQConfig(**COMMON | {"bits": 3, "group_size": 32}),
    "awq": lambda: AWQConfig(**COMMON, sym=False),
}


def let_positions_have_a_type() -> None:
    """AWQ asks Gemma 3 for positions without the type of the layer: that of most is taken."""
    find = Gemma3RotaryEmbedding.forward

    def forward(
        self: Gemma3RotaryEmbedding,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        layer_type: str = "sliding_attention",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return find(self, x, position_ids, layer_type)

    Gemma3RotaryEmbedding.forward = forward


def let_norms_be_gemmas() -> None:
    """AWQ takes Gemma 3's layers for Llama's.

    It divides norms as if they multiplied by their weight, where Gemma's multiply by 1 + weight: it
    knows that of Gemma 2's, whose place they take. And it divides the norm behind attention for
    what it multiplies the perceptron's matrices by, where the one before these has to be.
    """
    scale.Gemma2RMSNorm = Gemma3RMSNorm
    *path, layer = LlamaQModel.module_tree
    behind, before = "post_attention_layernorm", "pre_feedforward_layernorm"
    tree = {before if key == behind else key: parts for key, parts in layer.items()}
    Gemma3QModel.module_tree = [*path, tree | {before: (f"{before}:!:norm",)}]


def main(kind: str, model: Path, calibration: Path, out: Path) -> None:
    let_positions_have_a_type()
    let_norms_be_gemmas()
    windows = json.loads(calibration.read_text())
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    if kind == "awq":
        # It multiplies them once for each of many scales.
        rows = rows[::4]
    quantized = GPTQModel.load(str(model), CONFIGS[kind](), dtype=torch.bfloat16)
    for module in quantized.model.modules():
        if isinstance(module, Gemma3RMSNorm):
            # AWQ divides 1 + weight by some hundreds: bf16 cannot hold such a weight, near -1.
            module.float()
    quantized.quantize(rows, batch_size=1)
    quantized.save(str(out))
    backend = BACKEND.AWQ_TORCH if kind == "awq" else BACKEND.GPTQ_TORCH
    loaded = GPTQModel.load(str(out), backend=backend, device="cpu", dtype=torch.float16)
    # AWQ changes norms too.
    stored, names = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    weights = {name: stored[name].float() for name in names if name in stored}
    with torch.inference_mode():
        for name, module in loaded.model.named_modules():
            if isinstance(module, BaseQuantLinear):
                identity = torch.eye(module.in_features, dtype=torch.float16)
                weights[f"{name}.weight"] = module(identity).float().T.contiguous()
    folder = out.with_name(out.name + ".plain")
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    kind, *paths = sys.argv[1:]
    main(kind, *map(Path, paths))
