from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagoda_kernels.cpu.attention.chunk_plan import KEY_BLOCK, Merge, Part, plan_chunks
from pagoda_kernels.cpu.attention.sequences import Sequences
from pagoda_kernels.paged_attention import AttentionSpec

BLOCK_SIZE = 16


def make_sequences(chunks, *, num_decodes=0):
    """Chunks are pairs of query tokens and all tokens; decode rows see three keys."""
    query_lens = np.array([1] * num_decodes + [queries for queries, _ in chunks])
    seq_lens = np.array([3] * num_decodes + [tokens for _, tokens in chunks])
    blocks = -(-seq_lens // BLOCK_SIZE)
    table = np.zeros((len(seq_lens), max(blocks)), dtype=np.int32)
    order = np.random.default_rng(0).permutation(sum(blocks)) + 1
    for row, count in zip(table, blocks, strict=True):
        row[:count], order = order[:count], order[count:]
    sequences = Sequences(
        query_lens, seq_lens, table, block_size=BLOCK_SIZE, num_blocks=sum(blocks) + 1
    )
    return sequences, table


def plan(chunks, *, window=0, num_decodes=0, heads=(4, 2), num_threads=2):
    num_heads, num_kv_heads = heads
    spec = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=64,
        windows=(window,),
        scale=1.0,
        dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
    )
    sequences, _ = make_sequences(chunks, num_decodes=num_decodes)
    seqs = np.arange(num_decodes, num_decodes + len(chunks))
    return plan_chunks(sequences, seqs, window, spec, num_threads)


def slot_of(table, seq, position):
    return table[seq, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


lengths = st.tuples(st.integers(2, 700), st.integers(0, 3000)).map(lambda n: (n[0], n[0] + n[1]))


@given(
    chunks=st.lists(lengths, min_size=1, max_size=3),
    window=st.sampled_from([0, 1, 40, 512]),
    num_decodes=st.integers(0, 2),
    num_threads=st.sampled_from([1, 2, 16]),
    num_heads=st.sampled_from([2, 14, 260]),
)
def test_every_query_sees_each_of_its_keys_once(
    chunks, window, num_decodes, num_threads, num_heads
):
    sequences, table = make_sequences(chunks, num_decodes=num_decodes)
    found = plan(
        chunks,
        window=window,
        num_decodes=num_decodes,
        heads=(num_heads, 2),
        num_threads=num_threads,
    )
    slots = found.slots.numpy()
    seen = [[] for _ in range(sum(sequences.query_lens))]
    for part in (Part(*row) for row in found.parts.tolist()):
        assert part.num_tokens * num_heads // 2 <= found.most_rows
        for token in range(part.num_tokens):
            newest = part.position + token
            oldest = max(0, newest - window + 1) if window else 0
            keys = slice(part.first_slot + oldest, part.first_slot + min(newest + 1, part.num_keys))
            seen[part.first_token + token].extend(slots[keys].tolist())
    for seq, (num_queries, num_tokens) in enumerate(chunks, num_decodes):
        for query in (0, num_queries // 2, num_queries - 1):
            position = num_tokens - num_queries + query
            oldest = max(0, position - window + 1) if window else 0
            expected = [slot_of(table, seq, key) for key in range(oldest, position + 1)]
            assert Counter(seen[sequences.starts[seq] + query]) == Counter(expected)
    assert not any(seen[:num_decodes])


@given(chunks=st.lists(lengths, min_size=1, max_size=3), num_threads=st.sampled_from([2, 16]))
def test_partial_results_are_merged_where_keys_were_cut(chunks, num_threads):
    found = plan(chunks, num_threads=num_threads)
    parts = [Part(*row) for row in found.parts.tolist()]
    merges = [Merge(*row) for row in found.merges.tolist()]
    merged = {
        (merge.first_token, merge.num_tokens, merge.first_partial + i)
        for merge in merges
        for i in range(merge.num_partials)
    }
    assert merged == {(p.first_token, p.num_tokens, p.partial) for p in parts if p.partial >= 0}
    partials = sorted(partial for _, _, partial in merged)
    assert partials == list(range(len(partials)))
    assert found.num_partial_numbers == len(partials) * 2 * found.partial_size


@pytest.mark.parametrize(("num_tokens", "num_merges"), [(KEY_BLOCK, 0), (8 * KEY_BLOCK, 1)])
def test_few_queries_of_many_keys_are_shared_by_the_threads(num_tokens, num_merges):
    found = plan([(16, num_tokens)], heads=(1, 1))
    assert len(found.merges) == num_merges
    assert found.merges.shape[1] == len(Merge._fields)
