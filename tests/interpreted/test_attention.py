"""What Triton's attention does beyond the contract of all: see tests/kernels."""

from __future__ import annotations

import pytest
import torch

from pagoda_kernels.kv_cache import LARGEST
from pagoda_kernels.paged_attention.decode_kernel import split_keys
from pagoda_kernels.paged_attention.testing import AttentionCase, no_rotation
from pagoda_kernels.paged_attention.triton_backend import TritonAttention
from pagoda_kernels.testing import watch_moves

TOLERANCE = {"atol": 4e-3, "rtol": 4e-3}


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float8_e4m3fn])
def test_every_head_dim_is_read_whole_and_nothing_beside_it(head_dim, kv_dtype):
    shape = {"heads": (6, 2, head_dim), "scale": head_dim**-0.5, "kv_dtype": kv_dtype}
    world = AttentionCase(TritonAttention, [1, 5], [130, 70], dtype=torch.float16, **shape)
    torch.testing.assert_close(world.attend().float(), world.expected(), **TOLERANCE)


@pytest.mark.parametrize("kv_dtype", LARGEST)
def test_queries_in_bf16_meet_keys_and_values_of_8_bits_in_fp16(kv_dtype):
    # bf16 is only widened and rounded to, which the interpreter does right.
    case = {"heads": (4, 1, 64), "scale": 0.125, "dtype": torch.bfloat16, "kv_dtype": kv_dtype}
    world = AttentionCase(TritonAttention, [1, 5], [300, 70], **case)
    torch.testing.assert_close(world.attend().float(), world.expected(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("heads", [(1, 1, 16), (5, 1, 16), (40, 2, 16), (71, 1, 16)])
def test_any_number_of_heads_shares_a_key_head(heads):
    world = AttentionCase(TritonAttention, [1, 20], [140, 30], heads=heads)
    torch.testing.assert_close(world.attend(), world.expected(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 150])
def test_a_deterministic_token_has_the_same_bits_whatever_its_step(window):
    options = {"is_deterministic": True, "window": window, "heads": (2, 1, 16)}
    world = AttentionCase(TritonAttention, [4, 1, 1], [300, 9, 500], **options)
    among_others = world.attend()[:4]
    one_by_one = [world.step([(0, i, i + 1)]) for i in range(296, 300)]
    assert torch.equal(among_others, torch.cat(one_by_one))
    torch.testing.assert_close(among_others, world.expected()[:4], atol=2e-5, rtol=1e-4)
    # As a step of a graph, which is for longer sequences and has rows that pad it.
    table = torch.zeros(2, 400, dtype=torch.int32)
    table[0, : world.block_table.shape[1]] = torch.from_numpy(world.block_table[0])
    plan = world.backend.plan_on_device(torch.tensor([300, 1], dtype=torch.int32), table)
    qkv = world.qkv[0][-1].flatten().repeat(2, 1)
    assert torch.equal(plan.attend(0, qkv, no_rotation(2, 16))[0], among_others[-1].flatten())


def test_keys_are_split_until_every_processor_has_something_to_read():
    spec = AttentionCase(TritonAttention, [1], [1], heads=(32, 8, 16)).spec
    parts = [split_keys(spec, num_rows, 8192, 132).num_programs for num_rows in (1, 4, 32, 256)]
    assert parts == [32, 13, 2, 1]
    assert split_keys(spec, 1, 300, 132).num_programs == 3


def reads_of_keys(world):
    """[num_tokens of the first sequence]: how often a step reads each key and value; all alike."""
    with watch_moves() as moves:
        world.attend()
    numbers, scales = world.backend.kv_caches[0]
    # Those of 8 bits are read by twos.
    numbers = numbers if scales is None else numbers.view(torch.int16)
    reads = moves.loads(numbers)[world.block_table[0]].flatten(0, 1)
    assert torch.all(reads == reads[:, :1, :1, :1])
    return reads[: world.seq_lens[0], 0, 0, 0]


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_row_reads_what_it_sees_once_for_all_heads(window, kv_dtype):
    case = {"heads": (8, 2, 64), "window": window, "dtype": torch.float16, "kv_dtype": kv_dtype}
    reads = reads_of_keys(AttentionCase(TritonAttention, [1, 1], [333, 50], **case))
    num_seen = window or 333
    assert torch.all(reads[:-num_seen] == 0)
    assert torch.all(reads[-num_seen:] == 1)


@pytest.mark.parametrize("window", [0, 40])
def test_a_chunk_reads_keys_once_for_each_tile_that_sees_them(window):
    case = {"heads": (8, 2, 64), "window": window, "dtype": torch.float16}
    reads = reads_of_keys(AttentionCase(TritonAttention, [100], [150], **case))
    expected = torch.zeros(150, dtype=torch.int64)
    # Tiles have 64 rows, of 4 heads.
    for token in range(50, 150, 16):
        oldest = max(0, token + 1 - window) if window else 0
        expected[oldest : token + 16] += 1
    assert torch.equal(reads, expected)
