"""Triton's attention on a GPU, where products are of bf16: what interpreters cannot say."""

from __future__ import annotations

import pytest
import torch

from pagoda_kernels.kv_cache import LARGEST
from pagoda_kernels.paged_attention.reference import ReferenceAttention
from pagoda_kernels.paged_attention.testing import AttentionCase, no_rotation
from pagoda_kernels.paged_attention.triton_backend import TritonAttention

pytestmark = pytest.mark.gpu

TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 1e-4},
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
}
# Rows with one split and several, chunks of one tile and several, in any order.
LENS = [1, 40, 1, 3, 1, 150], [5, 40, 700, 90, 2000, 400]
SCORES = {"soft_cap": 5.0, "alibi_slopes": (0.5, 0.1, 0.2, 0.3), "has_sinks": True}


def attend(lens=LENS, dtype=torch.bfloat16, make=TritonAttention, **options):
    device = torch.device("cuda")
    world = AttentionCase(make, *lens, dtype=dtype, device=device, block_size=16, **options)
    return world, world.attend().float()


def assert_right(dtype=torch.bfloat16, lens=LENS, **options):
    world, attended = attend(lens, dtype, **options)
    torch.testing.assert_close(attended, world.expected(), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("options", [{}, SCORES], ids=["plain", "changed scores"])
def test_rows_and_chunks_get_the_brute_force_sum(dtype, window, options):
    assert_right(dtype, heads=(4, 2, 64), window=window, scale=0.125, **options)


@pytest.mark.parametrize("kv_dtype", LARGEST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 100])
def test_keys_and_values_of_8_bits_are_widened_to_what_they_stand_for(kv_dtype, dtype, window):
    assert_right(dtype, heads=(4, 1, 128), window=window, scale=0.09, kv_dtype=kv_dtype)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_every_head_dim_is_attended_to(head_dim, kv_dtype):
    assert_right(heads=(6, 2, head_dim), scale=head_dim**-0.5, kv_dtype=kv_dtype)


@pytest.mark.parametrize("heads", [(1, 1, 64), (5, 1, 64), (71, 1, 64), (32, 32, 64)])
def test_any_number_of_heads_shares_a_key_head(heads):
    assert_right(heads=heads, scale=0.125, lens=([1, 70, 1], [600, 90, 20]))


@pytest.mark.parametrize("num_tokens", [100, 2500])
def test_a_prompt_gets_what_flash_attention_gives(num_tokens):
    world, attended = attend(([num_tokens], [num_tokens]), heads=(32, 8, 128), scale=128**-0.5)
    q, k, v = (x.transpose(0, 1)[None].cuda() for x in world.qkv[0].split([32, 8, 8], 1))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(
        attended, expected[0].transpose(0, 1).float().cpu(), atol=1e-2, rtol=2e-2
    )


def test_many_rows_get_what_the_specification_gives():
    options = {"lens": ([1] * 64, [37 * i + 1 for i in range(64)]), "heads": (32, 8, 128)}
    _, attended = attend(**options)
    _, expected = attend(**options, make=ReferenceAttention)
    torch.testing.assert_close(attended, expected, **TOLERANCE[torch.bfloat16])


def test_a_deterministic_token_has_the_same_bits_whatever_its_step():
    case = {"heads": (32, 8, 128), "is_deterministic": True, "scale": 0.09}
    world, attended = attend(([60, 1, 1], [3000, 9, 2000]), **case)
    one_by_one = [world.step([(0, i, i + 1)]) for i in range(2940, 3000)]
    assert torch.equal(attended[:60], torch.cat(one_by_one).float())


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_recorded_plan_attends_to_what_its_tensors_tell_when_it_is_replayed(kv_dtype):
    world, expected = attend(([1, 1], [300, 40]), heads=(32, 8, 128), kv_dtype=kv_dtype)
    device = world.spec.device
    seq_lens = torch.ones(4, dtype=torch.int32, device=device)
    block_table = torch.zeros(4, 64, dtype=torch.int32, device=device)
    qkv = torch.zeros(4, world.spec.qkv_size, dtype=torch.bfloat16, device=device)
    rotary, plan = no_rotation(4, 128, device), world.backend.plan_on_device(seq_lens, block_table)
    plan.attend(0, qkv.clone(), rotary)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attended = plan.attend(0, qkv.clone(), rotary)
    seq_lens[:2] = torch.tensor([300, 40], dtype=torch.int32)
    block_table[:2, : world.block_table.shape[1]] = torch.from_numpy(world.block_table)
    qkv[:2] = torch.stack([rows[-1].flatten() for rows in world.qkv])
    graph.replay()
    found = attended[:2].view(2, 32, 128).float().cpu()
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.bfloat16])
