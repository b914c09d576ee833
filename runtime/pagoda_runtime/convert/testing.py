"""A tiny GGUF file with random weights, for tests."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 32, 4, 2, 8, 64, 2
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁ab"]
SCORES = [0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -2.0]
TYPES = [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1]


def tensors_of(architecture: str) -> dict[str, np.ndarray]:
    """What write_gguf writes: the same random numbers each time."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    tensors = {"token_embd.weight": random(len(TOKENS), HIDDEN), "output_norm.weight": random(32)}
    for layer in range(LAYERS):
        parts = {
            "attn_norm.weight": random(HIDDEN),
            "attn_q.weight": random(HEADS * HEAD_DIM, HIDDEN),
            "attn_k.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output.weight": random(HIDDEN, HEADS * HEAD_DIM),
            "ffn_norm.weight": random(HIDDEN),
            "ffn_gate.weight": random(FFN, HIDDEN),
            "ffn_up.weight": random(FFN, HIDDEN),
            "ffn_down.weight": random(HIDDEN, FFN),
        }
        if architecture == "qwen2":
            parts |= {
                f"attn_{x}.bias": random(parts[f"attn_{x}.weight"].shape[0]) for x in ("q", "k")
            }
        if architecture == "gemma3":
            parts |= {"post_attention_norm.weight": random(32), "post_ffw_norm.weight": random(32)}
        tensors |= {f"blk.{layer}.{name}": value for name, value in parts.items()}
    return tensors


def write_gguf(
    path: Path, architecture: str, *, extra: dict[str, np.ndarray] | None = None
) -> Path:
    """Write a GGUF file of an architecture as gguf names it; returns its path."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
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
    for name, value in (tensors_of(architecture) | (extra or {})).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
