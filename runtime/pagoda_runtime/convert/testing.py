"""A tiny GGUF file with random weights, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 32, 4, 2, 8, 64, 2
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁ab"]
SCORES = [0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -2.0]
TYPES = [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1]


def tensors_of(architecture: str, size: int = 1) -> dict[str, np.ndarray]:
    """What write_gguf writes: the same random numbers each time.

    size: what HIDDEN, HEAD_DIM and FFN are multiplied by.
    """
    rng = np.random.default_rng(0)
    hidden, head_dim, ffn = (size * of_one for of_one in (HIDDEN, HEAD_DIM, FFN))

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    tensors = {
        "token_embd.weight": random(len(TOKENS), hidden),
        "output_norm.weight": random(hidden),
    }
    for layer in range(LAYERS):
        parts = {
            "attn_norm.weight": random(hidden),
            "attn_q.weight": random(HEADS * head_dim, hidden),
            "attn_k.weight": random(KV_HEADS * head_dim, hidden),
            "attn_v.weight": random(KV_HEADS * head_dim, hidden),
            "attn_output.weight": random(hidden, HEADS * head_dim),
            "ffn_norm.weight": random(hidden),
            "ffn_gate.weight": random(ffn, hidden),
            "ffn_up.weight": random(ffn, hidden),
            "ffn_down.weight": random(hidden, ffn),
        }
        if architecture == "qwen2":
            parts |= {
                f"attn_{x}.bias": random(parts[f"attn_{x}.weight"].shape[0]) for x in ("q", "k")
            }
        if architecture == "gemma3":
            norms = "post_attention_norm.weight", "post_ffw_norm.weight"
            parts |= {name: random(hidden) for name in norms}
        tensors |= {f"blk.{layer}.{name}": value for name, value in parts.items()}
    return tensors


def write_gguf(
    path: Path,
    architecture: str,
    *,
    extra: Mapping[str, np.ndarray] | None = None,
    blocks: Mapping[str, tuple[str, np.ndarray]] | None = None,
    size: int = 1,
) -> Path:
    """Write a GGUF file of an architecture as gguf names it; returns its path.

    Args:
        blocks: tensors that are not random: their types, and their rows of bytes.
        size: see `tensors_of`.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(size * HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(size * FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(size * HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(16)
    writer.add_rope_freq_base(500_000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores(SCORES)
    writer.add_token_types(TYPES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in {**tensors_of(architecture, size), **(extra or {})}.items():
        if name not in (blocks or {}):
            writer.add_tensor(name, value)
    for name, (kind, rows) in (blocks or {}).items():
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
