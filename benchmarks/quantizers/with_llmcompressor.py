"""Quantize a model folder by llmcompressor, in an environment of its own: see quant_real.py.

    python with_llmcompressor.py KIND MODEL CALIBRATION OUT

CALIBRATION is a JSON file of lists of token ids. OUT becomes the quantized folder, OUT.plain one
with the weights in fp32 that llmcompressor itself makes of OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

COMMON = {"targets": "Linear", "ignore": ["lm_head"]}
RECIPES = {
    "ct_fp8": lambda: QuantizationModifier(scheme="FP8_DYNAMIC", **COMMON),
    "ct_fp8_static": lambda: QuantizationModifier(scheme="FP8", **COMMON),
    "ct_fp8_block": lambda: QuantizationModifier(scheme="FP8_BLOCK", **COMMON),
    "ct_int8": lambda: GPTQModifier(scheme="W8A8", **COMMON),
    "ct_int4": lambda: GPTQModifier(scheme="W4A16", **COMMON),
    "ct_int4_asym": lambda: GPTQModifier(scheme="W4A16_ASYM", **COMMON),
}


def plain_names(model: Path) -> set[str]:
    with safe_open(model / "model.safetensors", "pt") as file:
        return set(file.keys())


def main(kind: str, model: str, calibration: Path, out: Path) -> None:
    windows = json.loads(calibration.read_text())
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
        tokenizer=model,
        dataset=Dataset.from_list(rows),
        recipe=RECIPES[kind](),
        num_calibration_samples=len(rows),
        max_seq_length=len(windows[0]),
        shuffle_calibration_samples=False,
        output_dir=str(out),
    )
    config = CompressedTensorsConfig(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=config
    )
    names = plain_names(Path(model))
    weights = {n: t.float().clone() for n, t in plain.state_dict().items() if n in names}
    folder = out.with_name(out.name + ".plain")
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    kind, model, calibration, out = sys.argv[1:]
    main(kind, model, Path(calibration), Path(out))
