"""Model folders: the one that is measured, and one of a real model's shape with random weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

# config.json of Qwen/Qwen3-1.7B, as far as it determines the computation.
QWEN3_1_7B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
NEEDED_BYTES = 8 << 30


def cache_folder() -> Path:
    return Path(os.environ.get("PAGODA_CACHE", "~/.cache/pagoda")).expanduser()


def gemma_folder() -> Path:
    """Where `make model` puts Gemma 3 270M."""
    return cache_folder() / "model" / "gemma-3-270m"


def require_model(folder: Path) -> Path:
    """Raises: SystemExit if it is not a model folder."""
    if not (folder / "config.json").exists():
        raise SystemExit(f"{folder} is not a model folder. Run `make model` first.")
    return folder


def make_qwen3_1_7b(cache: Path) -> Path:
    """The folder in the cache, made at the first call (3.4 GB)."""
    folder = cache / "random" / "qwen3-1.7b"
    if (folder / "config.json").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < NEEDED_BYTES:
        raise SystemExit(f"{cache} has {free >> 30} GiB free; this needs {NEEDED_BYTES >> 30} GiB.")
    from transformers import AutoConfig, AutoModelForCausalLM

    print(f"Making {folder} …", flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **QWEN3_1_7B)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(partial)
    write_tokenizer(partial, QWEN3_1_7B["vocab_size"])
    partial.rename(folder)
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """tokenizer.json in which every id has a text: bytes first, then numbers.

    A stream of tokens without text would send nothing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Ġ is the byte-level alphabet's space.
    numbers = [f"Ġ{number}" for number in range(len(alphabet), vocab_size)]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *numbers])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
