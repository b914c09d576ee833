"""Small GGUF files written here, converted, and compared with what went in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from pagoda_runtime.convert import convert
from pagoda_runtime.convert.architectures import llama3_factors
from pagoda_runtime.convert.testing import HEAD_DIM, HEADS, TOKENS, tensors_of, write_gguf
from pagoda_runtime.convert.tokenizer import merges_by_score
from pagoda_runtime.errors import FatalError


def test_llama_heads_come_back_in_the_order_of_the_checkpoint(tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "a.gguf", "llama"), tmp_path / "out", dtype="float32")

    q = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    stored = torch.from_numpy(tensors_of("llama")["blk.0.attn_q.weight"])
    # llama.cpp stores the rows of a head as 0, d/2, 1, d/2 + 1, …
    for head in range(HEADS):
        for row in range(HEAD_DIM):
            source = head * HEAD_DIM + 2 * (row % (HEAD_DIM // 2)) + row // (HEAD_DIM // 2)
            assert torch.equal(q[head * HEAD_DIM + row], stored[source])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_transformers_loads_every_tensor_of_the_folder(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    convert(write_gguf(tmp_path / "a.gguf", architecture), tmp_path / "out", dtype="float32")

    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    # The little file leaves out what only the real ones carry: v's bias, and the norms of q and k.
    assert {name.split(".", 4)[-1] for name in report["missing_keys"]} <= {
        "v_proj.bias",
        "q_norm.weight",
        "k_norm.weight",
    }


def test_gemma_norms_lose_the_one_that_llama_cpp_adds(tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "a.gguf", "gemma3"), tmp_path / "out", dtype="float32")

    weights = load_file(tmp_path / "out" / "model.safetensors")
    stored = tensors_of("gemma3")
    for ours, theirs in {
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.pre_feedforward_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.layers.1.post_feedforward_layernorm.weight": "blk.1.post_ffw_norm.weight",
    }.items():
        torch.testing.assert_close(weights[ours], torch.from_numpy(stored[theirs] - 1))


def test_rope_factors_of_llama_3_are_recognised(tmp_path: Path) -> None:
    rope = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(HEAD_DIM, 500_000.0, rope).astype(np.float32)
    source = write_gguf(tmp_path / "a.gguf", "llama", extra={"rope_freqs.weight": factors})

    convert(source, tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "llama3", "rope_theta": 500_000.0, **rope}


def test_the_tokenizer_prefers_the_best_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "a.gguf", "llama"), tmp_path / "out")

    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("ab").tokens == ["<s>", "▁ab"]
    ids = tokenizer.encode("ab é").ids
    assert tokenizer.decode(ids) == "ab é"
    assert TOKENS.index("<0xC3>") in ids


def test_merges_are_ordered_by_score_and_skip_control_tokens() -> None:
    tokens, scores, types = (
        ["a", "b", "ab", "aba", "<a>"],
        [0.0, 0.0, -2.0, -1.0, 0.0],
        [1] * 4 + [3],
    )
    assert merges_by_score(tokens, scores, types) == [("ab", "a"), ("a", "b")]


@pytest.mark.parametrize(
    ("prepare", "reason", "words"),
    [
        (lambda p: None, "ModelNotFound", "no such file"),
        (lambda p: p.write_bytes(b"GGUF"), "CorruptWeights", "Download it again"),
        (lambda p: write_gguf(p, "bloom"), "UnsupportedArchitecture", "gemma3, llama"),
    ],
)
def test_a_wrong_source_is_named(tmp_path: Path, prepare, reason: str, words: str) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "a.gguf"
    prepare(source)
    with pytest.raises(FatalError, match=words) as error:
        convert(source, tmp_path / "out")
    assert error.value.reason == reason
    assert str(source) in error.value.message
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    with pytest.raises(FatalError, match="not empty"):
        convert(write_gguf(tmp_path / "a.gguf", "llama"), tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "keep"
