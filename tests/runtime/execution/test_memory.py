from __future__ import annotations

import dataclasses

import pytest
import torch

from pagoda_runtime.config import KV_CACHE_DTYPES, EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution.memory import make_attention, size_kv_cache
from pagoda_runtime.layers.rope_config import RopeConfig
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.registry import make_model
from pagoda_runtime.platforms import MemoryBudget
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.unquantized import UnquantizedLinear

# 2 (key, value) * 2 layers * 1 head * 8 dimensions * 2 bytes = 64 bytes for a token.
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    names={},
    vocab_size=32,
    hidden_size=8,
    intermediate_size=8,
    num_layers=2,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    norm_eps=1e-6,
    max_position_embeddings=100,
    activation="silu",
    tie_word_embeddings=False,
    rope=(RopeConfig(10_000.0),) * 2,
    sliding_windows=(0, 0),
)
BLOCK_BYTES = 64 * 16


def size(num_blocks, *, knob="--kv-cache-memory-bytes", max_num_seqs=8, max_model_len=None):
    return size_kv_cache(
        CONFIG,
        MemoryBudget(num_blocks * BLOCK_BYTES, knob),
        block_size=16,
        block_bytes=BLOCK_BYTES,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )


def test_the_budget_is_used_but_for_the_padding_block():
    result = size(20)
    assert (result.num_blocks, result.max_model_len) == (19, 100)
    assert result.total_bytes == 20 * BLOCK_BYTES


def test_no_more_blocks_than_all_sequences_can_fill():
    assert size(1_000_000).num_blocks == 8 * 7
    assert size(1_000_000, max_model_len=17).num_blocks == 8 * 2


def test_the_models_own_length_is_lowered_to_what_fits():
    result = size(4)
    assert (result.num_blocks, result.max_model_len) == (3, 48)


def test_a_length_that_the_user_gave_is_refused_with_both_numbers_and_the_remedy():
    with pytest.raises(FatalError) as caught:
        size(4, max_model_len=64)
    message = caught.value.message
    assert caught.value.reason == "KvCacheTooSmall"
    assert "64 tokens" in message
    assert f"{4 * BLOCK_BYTES} bytes is available" in message
    assert f"--kv-cache-memory-bytes to at least {5 * BLOCK_BYTES}" in message
    assert "--max-model-len to at most 48" in message
    assert size(5, max_model_len=64).max_model_len == 64


def test_the_remedy_names_the_knob_that_set_the_budget():
    with pytest.raises(FatalError, match="--gpu-memory-utilization, or set --kv-cache-memory-byt"):
        size(2, knob="--gpu-memory-utilization", max_model_len=64)


@pytest.mark.parametrize("num_blocks", [-3, 0, 1])
def test_a_cache_without_a_single_block_is_too_small(num_blocks):
    with pytest.raises(FatalError, match=f"at least {2 * BLOCK_BYTES} bytes") as caught:
        size(num_blocks)
    assert caught.value.reason == "KvCacheTooSmall"


def test_a_length_beyond_the_models_positions_is_an_invalid_flag():
    with pytest.raises(FatalError, match="at most 100") as caught:
        size(20, max_model_len=101)
    assert caught.value.reason == "InvalidFlags"


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_8_bits_make_at_least_nine_tenths_more_blocks(name, head_dim):
    config = dataclasses.replace(CONFIG, head_dim=head_dim, max_position_embeddings=1 << 20)
    placement = Placement(torch.bfloat16, torch.device("cpu"), UnquantizedLinear)
    model = make_model(config, placement)
    counts = {
        dtype: size_kv_cache(
            config,
            MemoryBudget(1 << 28, "--kv-cache-memory-bytes"),
            block_size=16,
            block_bytes=make_attention(
                EngineConfig(model="", block_size=16, kv_cache_dtype=dtype), model
            ).block_bytes,
            max_num_seqs=8,
            max_model_len=None,
        ).num_blocks
        for dtype in ("auto", name)
    }
    assert counts[name] >= 1.9 * counts["auto"]


def test_each_layer_has_a_cache_with_the_padding_block_on_top():
    config = EngineConfig(model="", block_size=16)
    placement = Placement(torch.bfloat16, torch.device("cpu"), UnquantizedLinear)
    model = make_model(CONFIG, placement)
    attention = make_attention(config, model)
    assert attention.block_bytes == BLOCK_BYTES
    attention.allocate(size(20).num_blocks + 1)
    assert [cache.numbers.shape for cache in attention.kv_caches] == [(20, 16, 2, 1, 8)] * 2
    assert sum(cache.numbers.nbytes for cache in attention.kv_caches) == size(20).total_bytes
