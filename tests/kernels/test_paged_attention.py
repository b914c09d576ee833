from __future__ import annotations

import numpy as np
import pytest
import torch

from pagoda_kernels.cpu.attention.chunk_plan import can_pack_keys
from pagoda_kernels.paged_attention import AttentionMetadata, HeadShape, paged_attention
from pagoda_kernels.paged_attention.reference import paged_attention_reference
from pagoda_kernels.write_kv_cache import write_kv_cache

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def make_case(
    query_lens,
    seq_lens,
    *,
    heads=4,
    kv_heads=2,
    head_dim=16,
    window=0,
    dtype=torch.float32,
    seed=0,
    **options,
):
    """Random sequences in randomly ordered blocks; every slot that nobody owns holds NaN."""
    torch.manual_seed(seed)
    block_size = 4
    used = [-(-n // block_size) for n in seq_lens]
    order = (np.random.default_rng(seed).permutation(sum(used) + 3) + 1).astype(np.int32)
    cache = torch.full((len(order) + 1, block_size, 2, kv_heads, head_dim), torch.nan, dtype=dtype)
    table = np.full((len(seq_lens), max(used)), order[-1], dtype=np.int32)
    keys_values = []
    for seq, seq_len in enumerate(seq_lens):
        table[seq, : used[seq]], order = order[: used[seq]], order[used[seq] :]
        kv = torch.randn(seq_len, 2, kv_heads, head_dim).to(dtype)
        positions = np.arange(seq_len)
        slots = table[seq, positions // block_size].astype(np.int64) * block_size
        write_kv_cache(kv, cache, torch.from_numpy(slots + positions % block_size))
        keys_values.append(kv)
    q = torch.randn(sum(query_lens), heads, head_dim).to(dtype)
    metadata = AttentionMetadata.build(
        query_lens,
        seq_lens,
        table,
        block_size=block_size,
        heads=HeadShape(heads, kv_heads, head_dim),
        windows=[window],
        dtype=dtype,
        device=CPU,
        **options,
    )
    return q, cache, metadata, keys_values


def brute_force(q, keys_values, query_lens, *, scale, window):
    """One query, one head, one key at a time."""
    out, first = torch.zeros(q.shape), 0
    for kv, num_queries in zip(keys_values, query_lens, strict=True):
        group = q.shape[1] // kv.shape[2]
        for index in range(num_queries):
            last = len(kv) - num_queries + index
            oldest = max(0, last - window + 1) if window else 0
            for head in range(q.shape[1]):
                keys, values = kv[oldest : last + 1, :, head // group].float().unbind(1)
                weights = torch.softmax(keys @ q[first + index, head].float() * scale, dim=0)
                out[first + index, head] = weights @ values
        first += num_queries
    return out


CASES = {
    "decode": ([1, 1, 1], [1, 5, 17]),
    "whole prompt": ([6], [6]),
    "chunk of a prompt": ([5], [13]),
    "mixed": ([1, 1, 7, 3, 9], [2, 30, 7, 11, 20]),
    "a chunk of several blocks of queries": ([1, 300], [9, 340]),
    "short prompts of different length, some partly computed": (
        [1, 5, 2, 16, 9, 30],
        [4, 5, 40, 16, 21, 30],
    ),
    "more short prompts than a batch takes": ([3] * 33, [3] * 20 + [11] * 13),
    "buckets of very different length": ([1, 1, 1, 1], [3, 250, 600, 900]),
}


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("case", CASES)
def test_both_paths_equal_the_brute_force_sum(case, window):
    query_lens, seq_lens = CASES[case]
    q, cache, metadata, keys_values = make_case(query_lens, seq_lens, window=window)
    expected = brute_force(q, keys_values, query_lens, scale=0.3, window=window)
    for attend in (paged_attention, paged_attention_reference):
        result = attend(q, cache, metadata, scale=0.3, sliding_window=window)
        torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("case", CASES)
def test_deterministic_plans_give_the_same_sums(case, window):
    query_lens, seq_lens = CASES[case]
    q, cache, metadata, keys_values = make_case(
        query_lens, seq_lens, window=window, is_deterministic=True
    )
    result = paged_attention(q, cache, metadata, scale=0.3, sliding_window=window)
    expected = brute_force(q, keys_values, query_lens, scale=0.3, window=window)
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [0, 600])
def test_the_bits_of_a_deterministic_token_do_not_depend_on_how_its_prompt_was_cut(dtype, window):
    options = {"window": window, "dtype": dtype, "is_deterministic": True}
    q, cache, metadata, _ = make_case([1300], [1300], **options)
    whole = paged_attention(q, cache, metadata, scale=0.3, sliding_window=window)
    for first, last in ((0, 7), (500, 530), (1110, 1300), (1299, 1300)):
        piece = AttentionMetadata.build(
            [last - first],
            [last],
            metadata.block_table.numpy(),
            block_size=4,
            heads=HeadShape(4, 2, 16),
            windows=[window],
            dtype=dtype,
            device=CPU,
            is_deterministic=True,
        )
        result = paged_attention(q[first:last], cache, piece, scale=0.3, sliding_window=window)
        assert torch.equal(result, whole[first:last])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_cpu_path_equals_the_reference(kv_heads, dtype):
    q, cache, metadata, _ = make_case(
        [1, 1, 1, 8, 150], [63, 100, 300, 40, 190], kv_heads=kv_heads, dtype=dtype
    )
    result = paged_attention(q, cache, metadata, scale=0.25)
    expected = paged_attention_reference(q, cache, metadata, scale=0.25, sliding_window=0)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (10, 2), (3, 3), (24, 3)])
@pytest.mark.parametrize("window", [0, 7])
def test_bf16_rows_are_walked_whatever_the_heads(heads, kv_heads, window):
    case = {"heads": heads, "kv_heads": kv_heads, "window": window, "dtype": torch.bfloat16}
    q, cache, metadata, keys_values = make_case([1, 1, 1, 3], [1, 33, 90, 20], **case)
    assert metadata.plans[window].walk is not None
    result = paged_attention(q, cache, metadata, scale=0.3, sliding_window=window)
    expected = brute_force(q.float(), keys_values, [1, 1, 1, 3], scale=0.3, window=window)
    torch.testing.assert_close(result.float(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 40.0])
def test_a_walk_is_exact_whether_one_key_has_all_the_weight_or_all_have_the_same(scale):
    q, cache, metadata, keys_values = make_case([1, 1], [60, 61], dtype=torch.bfloat16)
    result = paged_attention(q, cache, metadata, scale=scale)
    expected = brute_force(q.float(), keys_values, [1, 1], scale=scale, window=0)
    torch.testing.assert_close(result.float(), expected, atol=1e-2, rtol=1e-2)


CHUNKS = {
    "one query of two tokens": ([2], [2]),
    "a whole prompt": ([100], [100]),
    "a chunk that sees many keys": ([30], [1500]),
    "many chunks": ([1, 1, 5, 2, 16, 90, 30], [7, 300, 5, 40, 700, 95, 31]),
    "more queries than a block": ([1, 300, 17], [3, 700, 17]),
}


needs_dot_products = pytest.mark.skipif(
    not can_pack_keys(32, torch.bfloat16), reason="needs AVX512-bf16, and no AMX"
)


@needs_dot_products
@pytest.mark.parametrize("heads", [(4, 1, 64), (14, 2, 32), (3, 3, 96)], ids=str)
@pytest.mark.parametrize("window", [0, 7, 260])
@pytest.mark.parametrize("case", CHUNKS)
def test_chunks_in_bf16_equal_the_reference(case, window, heads):
    query_lens, seq_lens = CHUNKS[case]
    shape = dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))
    q, cache, metadata, _ = make_case(
        query_lens, seq_lens, window=window, dtype=torch.bfloat16, **shape
    )
    assert metadata.plans[window].chunks is not None
    # As in a model: between heads of keys and values, and before padding.
    padded = torch.full((len(q) + 2, q.shape[1] + 2, q.shape[2]), torch.nan, dtype=q.dtype)
    padded[:-2, :-2] = q
    metadata.buffer.rows(100_000, torch.empty(1)).fill_(torch.nan)
    result = paged_attention(padded[:, :-2], cache, metadata, scale=0.3, sliding_window=window)[:-2]
    expected = paged_attention_reference(q, cache, metadata, scale=0.3, sliding_window=window)
    torch.testing.assert_close(result, expected, atol=1e-2, rtol=1e-2)


@needs_dot_products
@pytest.mark.parametrize("scale", [1e-6, 1.0, 40.0])
def test_a_chunk_is_exact_whether_one_key_has_all_the_weight_or_all_have_the_same(scale):
    case = {"dtype": torch.bfloat16, "head_dim": 32, "kv_heads": 1}
    q, cache, metadata, keys_values = make_case([20], [2100], **case)
    assert len(metadata.plans[0].chunks.merges) == 1
    result = paged_attention(q, cache, metadata, scale=scale)
    expected = brute_force(q.float(), keys_values, [20], scale=scale, window=0)
    torch.testing.assert_close(result.float(), expected, atol=1e-2, rtol=1e-2)


@needs_dot_products
def test_a_chunk_never_reads_a_slot_outside_the_cache():
    q, cache, metadata, _ = make_case([5], [9], dtype=torch.bfloat16, head_dim=32)
    with pytest.raises(IndexError, match="outside the cache"):
        paged_attention(q, cache[:1], metadata, scale=0.25)


@needs_dot_products
def test_head_sizes_that_fill_no_panels_are_gathered():
    q, cache, metadata, _ = make_case([5], [9], dtype=torch.bfloat16, head_dim=48)
    assert metadata.plans[0].chunks is None
    expected = paged_attention_reference(q, cache, metadata, scale=0.3, sliding_window=0)
    result = paged_attention(q, cache, metadata, scale=0.3)
    torch.testing.assert_close(result, expected, atol=2e-2, rtol=2e-2)


def test_bf16_rows_that_see_many_keys_are_walked_too():
    q, cache, metadata, _ = make_case([1, 1, 1], [300, 500, 4000], dtype=torch.bfloat16)
    assert not metadata.plans[0].buckets
    result = paged_attention(q, cache, metadata, scale=0.25)
    expected = paged_attention_reference(q, cache, metadata, scale=0.25, sliding_window=0)
    torch.testing.assert_close(result, expected, atol=2e-2, rtol=2e-2)


def test_a_slot_outside_the_cache_is_never_read():
    q, cache, metadata, _ = make_case([1], [9], dtype=torch.bfloat16)
    with pytest.raises(IndexError, match="outside the cache"):
        paged_attention(q, cache[:1], metadata, scale=0.25)


def test_a_row_has_the_same_result_alone_and_among_longer_rows():
    q, cache, metadata, _ = make_case([1, 1, 1], [9, 90, 200])
    alone = AttentionMetadata.build(
        [1],
        [9],
        metadata.block_table[:1].numpy(),
        block_size=4,
        heads=HeadShape(4, 2, 16),
        windows=[0],
        dtype=torch.float32,
        device=CPU,
    )
    expected = paged_attention(q[:1], cache, alone, scale=0.3)
    torch.testing.assert_close(paged_attention(q, cache, metadata, scale=0.3)[:1], expected)


def test_rows_after_the_last_sequence_are_zero():
    q, cache, metadata, _ = make_case([1], [9])
    padded = torch.cat((q, torch.full_like(q, 7.0)))
    for attend in (paged_attention, paged_attention_reference):
        result = attend(padded, cache, metadata, scale=0.3, sliding_window=0)
        assert torch.all(result[1:] == 0.0)


def test_decode_rows_must_come_first():
    with pytest.raises(ValueError, match="must come before"):
        make_case([3, 1], [3, 4])


def test_wrong_shapes_and_dtypes_are_refused():
    q, cache, metadata, _ = make_case([1], [9])
    with pytest.raises(ValueError, match="multiple of 2"):
        paged_attention(q[:, :3], cache, metadata, scale=1.0)
    with pytest.raises(ValueError, match="must agree"):
        paged_attention(q.double(), cache, metadata, scale=1.0)
    with pytest.raises(ValueError, match="num_blocks"):
        paged_attention(q, cache[0], metadata, scale=1.0)
    for tokens, table in ((q[:0], cache), (q[:, :2], cache), (q.half(), cache.half())):
        with pytest.raises(ValueError, match="metadata was built for 1 tokens"):
            paged_attention(tokens, table, metadata, scale=1.0)
    with pytest.raises(ValueError, match="must be above 0"):
        paged_attention(q, cache, metadata, scale=0.0)
    with pytest.raises(ValueError, match="built for"):
        paged_attention(q, cache, metadata, scale=1.0, sliding_window=5)
