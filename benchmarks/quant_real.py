"""A model quantized by independent tools, loaded and measured here.

Each tool runs in an environment of its own in the cache folder, with the versions of torch and
transformers that it wants. What it made is measured by the perplexity of the English text of
Python's own help. In fp32 it must be that of the weights that the tool itself dequantizes it to, so
that no error of a loader hides in what rounding costs. EXL2 is written here. `make quant-real` runs
it; `make quant-tiny` writes the checkpoints that the tests read.

    python benchmarks/quant_real.py --out FILE [--only KIND ...]
    python benchmarks/quant_real.py --tiny FOLDER
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import cache_folder, gemma_folder, require_model
from environments import make_environment
from exl2_writer import write_exl2_folder
from llamacpp import gemma_file
from perplexity import Score, agreement, score, windows_of_text
from report import Result, publish
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pagoda_runtime import LLM
from pagoda_runtime.models.testing import make_tiny_checkpoint

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Tool:
    requirements: tuple[str, ...]
    kinds: tuple[str, ...]
    """Of the model that is measured."""
    tiny_kinds: tuple[str, ...]
    """Of the one that the tests read."""


TOOLS = {
    "gptqmodel": Tool(
        ("gptqmodel==7.7.0", "torch==2.15.0", "transformers==5.24.0", "accelerate==1.15.0"),
        ("gptq", "awq"),
        ("gptq", "gptq_desc_act", "gptq_8", "gptq_3", "awq"),
    ),
    "llmcompressor": Tool(
        ("llmcompressor==0.14.0.1", "torch==2.14.0", "transformers==5.17.0"),
        ("ct_fp8", "ct_int8", "ct_int4"),
        ("ct_fp8", "ct_fp8_static", "ct_fp8_block", "ct_int8", "ct_int4", "ct_int4_asym"),
    ),
}
ONLINE = ("fp8", "int8", "int4")
OWN_FILE = "q4_k_m"
"""The GGUF file that the model's folder was made from, in its own blocks."""
NUM_WINDOWS, WINDOW_TOKENS = 8, 512
EXACT_WINDOWS = 1
NUM_CALIBRATION_WINDOWS = 32
# Tools dequantize in 16 bits.
MOST_APART, LEAST_SAME = 0.003, 0.985
PROMPTS = [[5, 9, 100, 7, 42], list(range(40, 70))]
NUM_STEPS = 4


def docstrings() -> Iterator[str]:
    """Of the standard library's modules; other English than what is measured."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 200:
                    yield text


def calibration_of_text(folder: Path) -> list[list[int]]:
    token_ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(docstrings()))["input_ids"]
    apart = len(token_ids) // NUM_CALIBRATION_WINDOWS
    starts = range(0, NUM_CALIBRATION_WINDOWS * apart, apart)
    return [token_ids[start : start + WINDOW_TOKENS] for start in starts]


def quantize(tool: str, kind: str, model: Path, calibration: list[list[int]], out: Path) -> Path:
    """The folder that a tool makes; beside it, in .plain, one with what it dequantizes to."""
    done, made_from = out / "done", json.dumps([TOOLS[tool].requirements, calibration])
    if done.exists() and done.read_text() == made_from:
        return out
    plain = plain_of(out)
    for folder in (out, plain):
        shutil.rmtree(folder, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    windows = out.with_name(f"{out.name}.calibration.json")
    windows.write_text(json.dumps(calibration))
    print(f"  {kind}: quantized by {tool} …", flush=True)
    script = HERE / "quantizers" / f"with_{tool}.py"
    log = out.with_name(f"{out.name}.log")
    with log.open("w") as output:
        python = make_environment(f"quantizers/{tool}", TOOLS[tool].requirements) / "python"
        command = [python, script, kind, model, windows, out]
        # There, because gptqmodel writes logs of its own where it runs.
        ended = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, check=False, cwd=out.parent
        )
    if ended.returncode:
        raise SystemExit(f"{tool} failed; see {log}.")
    for path in model.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, plain)
    done.write_text(made_from)
    return out


def plain_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".plain")


def perplexity_of(folder: Path, windows: list[list[int]], **flags: Any) -> Score:
    with LLM(str(folder), max_model_len=1024, **flags) as llm:
        return score(llm, windows)


def measure(model: Path, kinds: dict[str, str | None], num_windows: int) -> Iterator[Result]:
    """kinds: of tools' folders, with the tool; None: made here, of EXL2."""
    windows = windows_of_text(model, num_windows, WINDOW_TOKENS)
    folders = {f"online_{flag}": (model, {"quantization": flag}) for flag in ONLINE}
    calibration = calibration_of_text(model)
    quantized = cache_folder() / "quantized"
    quantized.mkdir(parents=True, exist_ok=True)
    folders[OWN_FILE] = (gemma_file(), {})
    for kind, tool in kinds.items():
        out = quantized / kind
        if tool is None:
            write_exl2_folder(model, out, plain_of(out))
        else:
            quantize(tool, kind, model, calibration, out)
        folders[kind] = (out, {})
    exact = perplexity_of(model, windows, dtype="bfloat16")
    yield Result("perplexity_bf16", exact.perplexity, "", "bf16", exact.perplexity)
    for kind, (folder, flags) in folders.items():
        found = perplexity_of(folder, windows, dtype="bfloat16", **flags)
        note = {"same_likeliest": round(agreement(found, exact), 4)}
        if kind in kinds:
            note |= compare_with_tool(folder, windows[:EXACT_WINDOWS])
        values = found.perplexity, "", "bf16", exact.perplexity
        yield Result(f"perplexity_{kind}", *values, details=note)


def compare_with_tool(folder: Path, windows: list[list[int]]) -> dict[str, float]:
    """What this engine makes of a tool's folder in fp32, beside the weights that the tool makes."""
    ours, theirs = (
        perplexity_of(each, windows, dtype="float32") for each in (folder, plain_of(folder))
    )
    apart = abs(ours.perplexity / theirs.perplexity - 1)
    same = agreement(ours, theirs)
    if apart > MOST_APART or same < LEAST_SAME:
        raise SystemExit(
            f"{folder}: perplexity in fp32 is {ours.perplexity:.4f}, of what the tool dequantizes "
            f"it to {theirs.perplexity:.4f}, with {same:.4f} of the likeliest tokens alike."
        )
    return {"perplexity_apart_from_tool": round(apart, 6), "same_likeliest_as_tool": round(same, 4)}


def write_tiny(folder: Path) -> None:
    """A tiny random model in each format, and the logits of what its tool dequantizes it to."""
    model = cache_folder() / "quantized" / "tiny"
    sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    make_tiny_checkpoint(model, "llama", **sizes, **heads)
    draw = random.Random(0)
    calibration = [[draw.randrange(3, 128) for _ in range(64)] for _ in range(32)]
    for name, tool in TOOLS.items():
        for kind in tool.tiny_kinds:
            made = model.with_name(f"tiny-{kind}")
            quantize(name, kind, model, calibration, made)
            out = folder / kind
            out.mkdir(parents=True, exist_ok=True)
            for file in ("config.json", "model.safetensors"):
                shutil.copy(made / file, out)
            made_by = {"made_by": " ".join(tool.requirements)}
            expected = {"logits": greedy_logits(plain_of(made))}
            save_file(expected, out / "expected.safetensors", made_by)


@torch.inference_mode()
def greedy_logits(folder: Path) -> torch.Tensor:
    """[steps, prompts, vocab_size] fp32, as transformers finds them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        token_ids, steps = list(prompt), []
        for _ in range(NUM_STEPS):
            steps.append(model(torch.tensor([token_ids])).logits[0, -1])
            token_ids.append(int(steps[-1].argmax()))
        found.append(torch.stack(steps))
    return torch.stack(found, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--windows", type=int, default=NUM_WINDOWS)
    parser.add_argument("--only", nargs="*", help="of the formats, those that are measured")
    parser.add_argument("--tiny", type=Path, help="write the checkpoints of the tests there")
    arguments = parser.parse_args()
    if arguments.tiny:
        write_tiny(arguments.tiny)
        return
    if arguments.out is None:
        parser.error("--out is needed")
    model = require_model(gemma_folder())
    kinds: dict[str, str | None] = {
        kind: name for name, tool in TOOLS.items() for kind in tool.kinds
    }
    kinds["exl2"] = None
    if arguments.only is not None:
        kinds = {kind: kinds[kind] for kind in arguments.only}
    results = []
    for result in measure(model, kinds, arguments.windows):
        results.append(result)
        # A run of all takes half an hour: what was found is kept.
        publish(
            "quant-real",
            results,
            arguments.out,
            model=model.name,
            windows=arguments.windows,
            window_tokens=WINDOW_TOKENS,
            calibration_windows=NUM_CALIBRATION_WINDOWS,
            tools={name: list(tool.requirements) for name, tool in TOOLS.items()},
        )


if __name__ == "__main__":
    sys.exit(main())
