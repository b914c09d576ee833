"""The ways that attention on a CPU has: which is taken, and what only one of them could get wrong.

What all of them must do is in tests/kernels/test_attention_backends.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pagoda_kernels.cpu.attention.backend import CpuAttention
from pagoda_kernels.cpu.attention.chunk_plan import can_pack_keys
from pagoda_kernels.kv_cache import KVCache
from pagoda_kernels.paged_attention import HeadNorm, Rotary
from pagoda_kernels.paged_attention.reference import ReferenceAttention
from pagoda_kernels.paged_attention.testing import AttentionCase

BF16 = torch.bfloat16


def attend_with_reference(world):
    reference = ReferenceAttention(dataclasses.replace(world.spec, is_deterministic=False))
    reference.kv_caches = world.backend.kv_caches
    world.backend = reference
    return world.attend()


def ways_of(world):
    lens = zip(world.query_lens, world.seq_lens, strict=True)
    return world.plan([(seq, end - n, end) for seq, (n, end) in enumerate(lens)]).by_layer[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 600])
def test_the_bits_of_a_deterministic_token_do_not_depend_on_how_its_prompt_was_cut(dtype, window):
    world = AttentionCase(
        CpuAttention, [1300, 1], [1300, 70], dtype=dtype, window=window, is_deterministic=True
    )
    whole = world.attend()
    for first, last in ((0, 7), (500, 530), (1110, 1300), (1299, 1300)):
        assert torch.equal(world.step([(0, first, last)]), whole[first:last])
    assert torch.equal(world.step([(1, 69, 70), (0, 3, 4)])[0], whole[-1])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (10, 2), (3, 3), (24, 3)])
@pytest.mark.parametrize("window", [0, 7])
def test_decode_rows_are_right_whatever_the_heads(heads, kv_heads, window):
    case = {"heads": (heads, kv_heads, 16), "window": window, "dtype": BF16}
    world = AttentionCase(CpuAttention, [1, 1, 1, 3], [1, 33, 90, 20], **case)
    assert ways_of(world).decode is not None
    torch.testing.assert_close(world.attend().float(), world.expected(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 40.0])
def test_decode_is_exact_whether_one_key_has_all_the_weight_or_all_have_the_same(scale):
    world = AttentionCase(CpuAttention, [1, 1], [60, 61], dtype=BF16, scale=scale)
    torch.testing.assert_close(world.attend().float(), world.expected(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("query_lens", [[1], [9]], ids=["decode", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_that_queries_have_instead_of_keys_change_no_bit(dtype, query_lens):
    world = AttentionCase(CpuAttention, query_lens, [9], dtype=dtype, heads=(4, 2, 32))
    turns = torch.randn(9, 1, 16)
    cos, sin = turns.cos(), turns.sin()
    rotary = Rotary(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    weight, powers = torch.rand(6, 32), torch.exp2(torch.randint(-4, 5, (16,))).repeat(2)
    results = []
    for factor in (torch.ones(6, 32), torch.stack([powers] * 4 + [1 / powers] * 2)):
        norm = HeadNorm(weight * factor, torch.tensor(0.1))
        for first, last in ((0, 9), (9 - query_lens[0], 9)):
            qkv = world.qkv[0][first:last].flatten(1).clone()
            angles = Rotary(*(part[first:last].contiguous() for part in rotary))
            attended = world.plan([(0, first, last)]).attend(0, qkv, angles, norm)
        results.append(attended)
    assert torch.equal(*results)


CHUNKS = {
    "one query of two tokens": ([2], [2]),
    "a whole prompt": ([100], [100]),
    "a chunk that sees many keys": ([30], [1500]),
    "many chunks": ([1, 1, 5, 2, 16, 90, 30], [7, 300, 5, 40, 700, 95, 31]),
    "more queries than a block": ([1, 300, 17], [3, 700, 17]),
}


needs_dot_products = pytest.mark.skipif(
    not can_pack_keys(32, BF16), reason="needs AVX512-bf16, and no AMX"
)


@needs_dot_products
@pytest.mark.parametrize("heads", [(4, 1, 64), (14, 2, 32), (3, 3, 96)], ids=str)
@pytest.mark.parametrize("window", [0, 7, 260])
@pytest.mark.parametrize("case", CHUNKS)
def test_chunks_in_bf16_equal_the_reference(case, window, heads):
    world = AttentionCase(CpuAttention, *CHUNKS[case], window=window, dtype=BF16, heads=heads)
    assert ways_of(world).chunks is not None
    world.backend.scratch.numbers(100_000, torch.float32).fill_(torch.nan)
    lens = list(enumerate(zip(*CHUNKS[case], strict=True)))
    result = world.step([(seq, end - n, end) for seq, (n, end) in lens], num_padding=2)[:-2]
    torch.testing.assert_close(result, attend_with_reference(world), atol=1e-2, rtol=1e-2)


@needs_dot_products
@pytest.mark.parametrize("scale", [1e-6, 1.0, 40.0])
def test_a_chunk_is_exact_whether_one_key_has_all_the_weight_or_all_have_the_same(scale):
    case = {"dtype": BF16, "heads": (4, 1, 32), "scale": scale}
    world = AttentionCase(CpuAttention, [20], [2100], **case)
    assert len(ways_of(world).chunks.merges) == 1
    torch.testing.assert_close(world.attend().float(), world.expected(), atol=1e-2, rtol=1e-2)


@needs_dot_products
def test_head_sizes_that_fill_no_panels_are_gathered():
    world = AttentionCase(CpuAttention, [5], [9], dtype=BF16, heads=(4, 2, 48))
    assert ways_of(world).chunks is None
    torch.testing.assert_close(world.attend(), attend_with_reference(world), atol=2e-2, rtol=2e-2)


def test_rows_that_see_many_keys_are_right_too():
    world = AttentionCase(CpuAttention, [1, 1, 1], [300, 500, 4000], dtype=BF16, scale=0.25)
    torch.testing.assert_close(world.attend(), attend_with_reference(world), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_outside_the_cache_is_never_read(dtype):
    for query_lens in ([1], [5]):
        world = AttentionCase(CpuAttention, query_lens, [9], dtype=dtype, heads=(4, 2, 32))
        world.backend.kv_caches = [
            KVCache(cache.numbers[:1], None) for cache in world.backend.kv_caches
        ]
        with pytest.raises(IndexError, match="outside the cache"):
            world.attend()
