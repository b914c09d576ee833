"""How much memory a model takes while it is loaded, and after.

    python benchmarks/loading_memory.py --out FILE [--gb 2]

Checkpoints of equal layers with random numbers, of every kind but GGUF; each is loaded by a
process of its own, which reads how much anonymous memory it has every few milliseconds. The
process has loaded one of a single layer before, so that modules and compiled loops are not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from report import Bar, Result, publish
from safetensors.torch import save_file
from torch import Tensor

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.loading import load_model
from pagoda_runtime.models.model import Model
from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.platforms import choose_platform

HIDDEN, INTERMEDIATE, GROUP = 2048, 8192, 128
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (512, HIDDEN),
    "self_attn.v_proj": (512, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
MIB = 1 << 20


def _words(*size: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32)


def plain(outputs: int, inputs: int) -> dict[str, Tensor]:
    return {"weight": torch.randn(outputs, inputs).bfloat16()}


def awq(outputs: int, inputs: int) -> dict[str, Tensor]:
    return {
        "qweight": _words(inputs, outputs // 8),
        "qzeros": _words(inputs // GROUP, outputs // 8),
        "scales": torch.rand(inputs // GROUP, outputs).half(),
    }


def gptq(outputs: int, inputs: int) -> dict[str, Tensor]:
    """With inputs in any order."""
    return {
        "qweight": _words(inputs // 8, outputs),
        "qzeros": _words(inputs // GROUP, outputs // 8),
        "scales": torch.rand(inputs // GROUP, outputs).half(),
        "g_idx": (torch.arange(inputs) // GROUP)[torch.randperm(inputs)].int(),
    }


def fp8(outputs: int, inputs: int) -> dict[str, Tensor]:
    return {
        "weight": torch.randn(outputs, inputs).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.rand(outputs // GROUP, inputs // GROUP),
    }


def exl2(outputs: int, inputs: int) -> dict[str, Tensor]:
    """5 bits in the first half of the groups, 4 in the others."""
    num_groups = inputs // GROUP
    groups, row = [], 0
    for number in range(num_groups):
        bits = 5 if number < num_groups // 2 else 4
        groups += [bits, row]
        row += bits * GROUP // 32
    return {
        "q_weight": _words(row, outputs),
        "q_groups": torch.tensor(groups, dtype=torch.int16),
        "q_scale": _words(num_groups, outputs // 8),
        "q_scale_max": torch.rand(num_groups).half(),
        "q_invperm": torch.randperm(inputs).to(torch.int16),
    }


def int8(outputs: int, inputs: int) -> dict[str, Tensor]:
    return {
        "weight": torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8),
        "weight_scale": torch.rand(outputs, 1).bfloat16(),
    }


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FORMATS: dict[str, tuple[Callable[[int, int], dict[str, Tensor]], dict[str, Any]]] = {
    "plain": (plain, {}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}),
    "exl2": (exl2, {"quant_method": "exl2"}),
    "compressed-tensors": (
        int8,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "all": {
                    "targets": ["Linear"],
                    "weights": {**_INT8, "strategy": "channel"},
                    "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
                }
            },
        },
    ),
}
FLAGS = {"plain": (None, "int8", "int4", "fp8")}
"""Format → `--quantization` of what is loaded; of others only what they are."""


def write_checkpoint(folder: Path, kind: str, size_bytes: float) -> tuple[int, int]:
    """Return the bytes of the file, and of its largest tensor in a layer."""
    make, quantization = FORMATS[kind]
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(CONFIG["vocab_size"], HIDDEN).bfloat16(),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
    }
    # EXL2 quantizes the vocabulary's matrix, too.
    head = (make if kind == "exl2" else plain)(CONFIG["vocab_size"], HIDDEN)
    tensors |= {f"lm_head.{part}": tensor for part, tensor in head.items()}
    matrices = {name: make(*shape) for name, shape in SHAPES.items()}
    layer_bytes = sum(tensor.nbytes for parts in matrices.values() for tensor in parts.values())
    num_layers = max(1, round(size_bytes / layer_bytes))
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(HIDDEN).bfloat16()
        for name, parts in matrices.items():
            # A file has no tensor twice.
            tensors |= {f"{prefix}{name}.{part}": t.clone() for part, t in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {**CONFIG, "num_hidden_layers": num_layers}
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    largest = max(tensor.nbytes for parts in matrices.values() for tensor in parts.values())
    return (folder / "model.safetensors").stat().st_size, largest


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def watched_memory() -> Iterator[dict[str, int]]:
    """Anonymous bytes more than before, at the peak and at the end."""
    before, found, is_done = anonymous_bytes(), {"peak": 0}, threading.Event()

    def watch() -> None:
        while not is_done.wait(0.005):
            found["peak"] = max(found["peak"], anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        is_done.set()
        thread.join()
    found["held"] = anonymous_bytes() - before


def load(folder: Path, flag: str | None) -> dict[str, float]:
    """In this process."""

    def load_from(name: str) -> Model:
        path = str(folder / name)
        config = EngineConfig(model=path, device="cpu", quantization=flag, num_threads=2)
        return load_model(config, choose_platform("cpu"), TensorParallel(), lambda *_: None)

    load_from("one_layer")
    started = time.perf_counter()
    with watched_memory() as found:
        model = load_from("whole")  # Kept until memory has been read.
    seconds = time.perf_counter() - started
    table_bytes = 2 * CONFIG["vocab_size"] * HIDDEN
    return {**found, "weights": model.step_bytes + table_bytes, "seconds": seconds}


def measure(kind: str, size_bytes: float) -> list[Result]:
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(Path(scratch) / "one_layer", kind, 0)
        file_bytes, largest = write_checkpoint(Path(scratch) / "whole", kind, size_bytes)
        for flag in FLAGS.get(kind, (None,)):
            command = [
                sys.executable,
                __file__,
                "--load",
                scratch,
                *(["--flag", flag] if flag else []),
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            name = kind if flag is None else f"online_{flag}"
            details = {"file_mib": file_bytes / MIB, "seconds": found["seconds"]}
            limit = found["weights"] + 1.5 * largest
            results.append(
                Result(
                    f"{name}_peak",
                    found["peak"] / MIB,
                    "MiB",
                    "the weights + 1.5 × the largest tensor",
                    limit / MIB,
                    Bar(at_most=1.0),
                    details,
                )
            )
            bar = Bar(at_most=1.1) if flag is None else None
            weights, stored = found["weights"] / MIB, file_bytes / MIB
            details = {"anonymous_mib": found["held"] / MIB}
            results.append(
                Result(f"{name}_weights", weights, "MiB", "the file", stored, bar, details)
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--flag", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.load and not arguments.out:
        parser.error("--out is needed")
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.flag)))
        return
    results = [result for kind in FORMATS for result in measure(kind, arguments.gb * 1e9)]
    publish("loading-memory", results, arguments.out, gb=arguments.gb)


if __name__ == "__main__":
    main()
