"""How each family's GGUF fields and tensor names become Hugging Face's.

A family is one `Family` row. What the rows share is said once: the names of llama.cpp on the left,
those of the `transformers` checkpoint on the right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagoda_runtime.convert.reader import GgufFile
from pagoda_runtime.errors import FatalError

GLOBAL_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_LAYER_TENSORS = {
    **LAYER_TENSORS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One GGUF architecture: its `transformers` class, and where its files differ from the rest."""

    architecture: str
    model_type: str
    extra: dict[str, Any] = field(default_factory=dict)
    layer_tensors: dict[str, str] = field(default_factory=lambda: LAYER_TENSORS)
    norms_hold_one_plus_weight: bool = False
    """llama.cpp stores 1 + w where the checkpoint has w."""
    rope_pairs_are_adjacent: bool = False
    """llama.cpp reorders the rows of q and k so that rope rotates neighbours, not halves."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", rope_pairs_are_adjacent=True),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3"),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        extra={"hidden_activation": "gelu_pytorch_tanh"},
        layer_tensors=GEMMA_LAYER_TENSORS,
        norms_hold_one_plus_weight=True,
    ),
}
# Every sixth layer of Gemma 3 sees the whole context; GGUF leaves this and the theta of the local
# layers to the reader (Gemma 3 technical report, section 2).
GEMMA3_SLIDING_WINDOW_PATTERN = 6
GEMMA3_LOCAL_ROPE_THETA = 10_000.0


def family_of(file: GgufFile) -> Family:
    if file.architecture not in FAMILIES:
        raise FatalError(
            "UnsupportedArchitecture",
            f"{file.path}: architecture {file.architecture} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}.",
        )
    return FAMILIES[file.architecture]


def build_config(file: GgufFile, *, dtype: str) -> dict[str, Any]:
    """The config.json of the file's model."""
    family = family_of(file)
    num_heads = file.get("{arch}.attention.head_count", required=True)
    hidden_size = file.get("{arch}.embedding_length", required=True)
    num_layers = file.get("{arch}.block_count", required=True)
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": file.get("{arch}.feed_forward_length", required=True),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.get("{arch}.attention.head_count_kv", num_heads),
        "head_dim": file.get("{arch}.attention.key_length", hidden_size // num_heads),
        "max_position_embeddings": file.get("{arch}.context_length", required=True),
        "rms_norm_eps": _shortest_decimal(
            file.get("{arch}.attention.layer_norm_rms_epsilon", required=True)
        ),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        **_rope_fields(file),
        **family.extra,
    }
    if family.model_type == "gemma3_text":
        config |= _gemma3_fields(file, num_layers, config["head_dim"])
    return config


def checkpoint_name(file: GgufFile, name: str) -> str | None:
    """The checkpoint's name of a GGUF tensor; None for one that has no counterpart there.

    Raises: FatalError: CorruptWeights for a tensor that the family does not know.
    """
    stem, _, suffix = name.rpartition(".")
    if name == "rope_freqs.weight":
        return None  # its content is in rope_parameters
    if stem in GLOBAL_TENSORS:
        return f"{GLOBAL_TENSORS[stem]}.{suffix}"
    match stem.split(".", 2):
        case ["blk", layer, inner] if inner in family_of(file).layer_tensors:
            return f"model.layers.{layer}.{family_of(file).layer_tensors[inner]}.{suffix}"
    raise FatalError(
        "CorruptWeights", f"{file.path}: tensor {name} is unknown to {file.architecture} models."
    )


def restore(file: GgufFile, name: str, values: np.ndarray) -> np.ndarray:
    """Undo what llama.cpp changed in a tensor's values when it wrote the GGUF file."""
    family = family_of(file)
    if family.norms_hold_one_plus_weight and name.endswith("norm.weight"):
        return values - 1
    if family.rope_pairs_are_adjacent and name.endswith(("attn_q.weight", "attn_k.weight")):
        key = "head_count" if "attn_q" in name else "head_count_kv"
        num_heads = file.get("{arch}.attention." + key, required=True)
        pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(values.shape)
    return values


def _gemma3_fields(file: GgufFile, num_layers: int, head_dim: int) -> dict[str, Any]:
    pattern = GEMMA3_SLIDING_WINDOW_PATTERN
    full_rope = _rope_fields(file)["rope_parameters"]
    return {
        "query_pre_attn_scalar": head_dim,
        "sliding_window": file.get("{arch}.attention.sliding_window", required=True),
        "layer_types": [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(num_layers)
        ],
        "rope_parameters": {
            "full_attention": full_rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": GEMMA3_LOCAL_ROPE_THETA},
        },
    }


def _rope_fields(file: GgufFile) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(file.get("{arch}.rope.freq_base", 10_000.0)),
    }
    scaling = file.get("{arch}.rope.scaling.type", "none")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": float(file.get("{arch}.rope.scaling.factor"))}
    elif scaling != "none":
        raise FatalError(
            "InvalidModelConfig",
            f"{file.path}: rope scaling {scaling} is not supported; supported are none, linear "
            "and the factors of Llama 3.",
        )
    if "rope_freqs.weight" in file.tensors:
        factors = np.array(file.tensors["rope_freqs.weight"].data, dtype=np.float64)
        rope |= _llama3_rope(file, factors, rope["rope_theta"])
    return {"rope_parameters": rope}


def _llama3_rope(file: GgufFile, factors: np.ndarray, theta: float) -> dict[str, Any]:
    """Find the llama3 rope whose frequency factors these are (Llama 3.1: low 1, high 4, 8192)."""
    parameters = {
        "rope_type": "llama3",
        "factor": round(float(factors.max()), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(len(factors) * 2, theta, parameters)
    if not np.allclose(expected, factors, rtol=1e-3):
        raise FatalError(
            "InvalidModelConfig",
            f"{file.path}: the rope factors in rope_freqs.weight are not those of Llama 3.",
        )
    return parameters


def llama3_factors(head_dim: int, theta: float, rope: dict[str, Any]) -> np.ndarray:
    """[head_dim / 2] divisors of the rope frequencies, as Llama 3.1 defines them."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    context = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _shortest_decimal(value: float) -> float:
    """A float32 read as float64 looks like 9.999999974752427e-07; give back 1e-06."""
    return float(str(np.float32(value)))
