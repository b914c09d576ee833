"""What every attention backend does, against sums of one query, head and key at a time.

Where kernels in Triton are interpreted, their backend is the one that is tested.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from pagoda_kernels.cpu.attention.backend import CpuAttention
from pagoda_kernels.kv_cache import LARGEST
from pagoda_kernels.launch import IS_INTERPRETED
from pagoda_kernels.paged_attention import HeadNorm, Rotary, make_backend
from pagoda_kernels.paged_attention.reference import ReferenceAttention
from pagoda_kernels.paged_attention.testing import AttentionCase, brute_force, no_rotation
from pagoda_kernels.paged_attention.triton_backend import TritonAttention

TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 1e-4},
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
}
if IS_INTERPRETED:
    # The interpreter does not compute in bf16.
    del TOLERANCE[torch.bfloat16]
BACKENDS = (
    {"triton": TritonAttention}
    if IS_INTERPRETED
    else {
        "reference": ReferenceAttention,
        "cpu": CpuAttention,
        "cpu, deterministic": lambda spec: CpuAttention(
            dataclasses.replace(spec, is_deterministic=True)
        ),
    }
)
# The interpreter needs milliseconds for a token, and tiles are smaller on GPUs.
LONG_CHUNK = 70 if IS_INTERPRETED else 300
CASES = {
    "decode": ([1, 1, 1], [1, 5, 17]),
    "whole prompt": ([6], [6]),
    "chunk of a prompt": ([5], [13]),
    "mixed": ([1, 1, 7, 3, 9], [2, 30, 7, 11, 20]),
    "a chunk of several blocks of queries": ([1, LONG_CHUNK], [9, LONG_CHUNK + 40]),
    "short prompts of different length, some partly computed": (
        [1, 5, 2, 16, 9, 30],
        [4, 5, 40, 16, 21, 30],
    ),
    "more short prompts than a batch takes": ([3] * 33, [3] * 20 + [11] * 13),
    "rows of very different length": ([1, 1, 1, 1], [3, 250, 600, 900]),
    "rows and chunks in any order": ([5, 1, 30, 1, 2], [9, 90, 31, 2, 300]),
}


QUANTIZED = BACKENDS
"""Backends with keys and values of 8 bits."""
SCORES = {
    "soft cap": {"soft_cap": 2.0},
    "ALiBi": {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    "sinks": {"has_sinks": True},
    "all of them": {"soft_cap": 5.0, "alibi_slopes": (0.5, 0.1, 0.2, 0.3), "has_sinks": True},
}
FOR_GPUS = BACKENDS if IS_INTERPRETED else {"reference": ReferenceAttention}
"""Backends that have more than q·k for a score, and plan on the device."""


@pytest.fixture(params=BACKENDS)
def make(request):
    return BACKENDS[request.param]


@pytest.mark.parametrize("backend", QUANTIZED)
@pytest.mark.parametrize("kv_dtype", LARGEST)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [0, 6])
def test_keys_and_values_of_8_bits_are_attended_to_as_they_are_stored(
    backend, kv_dtype, dtype, window
):
    case = {"heads": (6, 2, 32), "window": window, "dtype": dtype, "kv_dtype": kv_dtype}
    lens = [1, 5, 30, 1, LONG_CHUNK], [63, 13, 30, 1, LONG_CHUNK + 40]
    world = AttentionCase(QUANTIZED[backend], *lens, **case)
    torch.testing.assert_close(world.attend().float(), world.expected(), **TOLERANCE[dtype])


@pytest.mark.parametrize("backend", FOR_GPUS)
@pytest.mark.parametrize("options", SCORES)
@pytest.mark.parametrize("window", [0, 6])
def test_scores_are_capped_and_biased_and_sinks_take_their_part(backend, options, window):
    lens = [1, 5, 30, 1], [63, 13, 30, 1]
    world = AttentionCase(FOR_GPUS[backend], *lens, window=window, **SCORES[options])
    torch.testing.assert_close(world.attend(), world.expected(), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("case", CASES)
def test_ragged_sequences_get_the_brute_force_sum(make, case, window):
    world = AttentionCase(make, *CASES[case], window=window)
    torch.testing.assert_close(world.attend(), world.expected(), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype_and_number_of_heads_per_key_gets_it_too(make, kv_heads, dtype):
    lens = [1, 1, 1, 8, LONG_CHUNK], [63, 100, 300, 40, LONG_CHUNK + 40]
    world = AttentionCase(make, *lens, heads=(4, kv_heads, 16), dtype=dtype, scale=0.25)
    torch.testing.assert_close(world.attend().float(), world.expected(), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [0, 6])
def test_chunks_of_a_prompt_give_what_the_whole_gives(make, dtype, window):
    world = AttentionCase(make, [90], [90], heads=(4, 2, 32), dtype=dtype, window=window)
    whole = world.attend()
    chunks = [world.step([(0, *cut)]) for cut in ((0, 7), (7, 8), (8, 61), (61, 90))]
    torch.testing.assert_close(torch.cat(chunks), whole, **TOLERANCE[dtype])


def test_a_row_has_the_same_result_alone_and_among_longer_rows(make):
    world = AttentionCase(make, [1, 1, 1], [9, 90, 200])
    torch.testing.assert_close(world.step([(0, 8, 9)]), world.attend()[:1])


def test_sequences_that_share_blocks_read_what_one_of_them_wrote(make):
    world = AttentionCase(make, [9, 4], [21, 16])
    # The second begins with three blocks of the first: its own are never written.
    world.block_table[1, :3] = world.block_table[0, :3]
    world.qkv[1][:12] = world.qkv[0][:12]
    torch.testing.assert_close(world.attend(), world.expected(), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("kv_dtype", [torch.float32, *LARGEST])
def test_copied_blocks_are_read_in_the_place_of_their_sources(make, kv_dtype):
    world = AttentionCase(make, [1], [9], kv_dtype=kv_dtype)
    expected = world.step([(0, 8, 9)])
    sources = world.block_table[0].tolist()
    targets = [
        block for block in range(1, world.backend.kv_caches[0].num_blocks) if block not in sources
    ]
    world.backend.copy_blocks(sources, targets[: len(sources)])
    for part in itertools.chain(*(cache.tensors for cache in world.backend.kv_caches)):
        part[sources] = torch.nan if part.is_floating_point() else 255
    world.block_table[0] = targets[: len(sources)]
    torch.testing.assert_close(world.step([(0, 8, 9)]), expected)


def test_blocks_before_the_window_may_have_been_given_back(make):
    world = AttentionCase(make, [1, 7], [40, 41], window=6)
    expected = world.attend()
    world.block_table[:, :6] = 0
    torch.testing.assert_close(world.attend(), expected)


@pytest.mark.parametrize("backend", FOR_GPUS)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("window", [0, 6])
def test_a_plan_on_the_device_is_of_what_its_tensors_tell_when_it_attends(
    backend, kv_dtype, window
):
    world = AttentionCase(FOR_GPUS[backend], [1, 1], [9, 30], window=window, kv_dtype=kv_dtype)
    seq_lens = torch.ones(3, dtype=torch.int32)
    block_table = torch.zeros(3, 9, dtype=torch.int32)
    plan = world.backend.plan_on_device(seq_lens, block_table)
    qkv, rotary = torch.stack([world.qkv[0][0]] * 3).flatten(1), no_rotation(3, 16)
    padding = plan.attend(0, qkv.clone(), rotary)[:1]
    seq_lens[:2] = torch.tensor([9, 30])
    block_table[:2, :8] = torch.from_numpy(world.block_table)
    qkv[0], qkv[1] = world.qkv[0][-1].flatten(), world.qkv[1][-1].flatten()
    attended = plan.attend(0, qkv, rotary)
    expected = world.expected().flatten(1)
    torch.testing.assert_close(attended[:2], expected, **TOLERANCE[torch.float32])
    torch.testing.assert_close(attended[2:], padding)


@pytest.mark.parametrize("rotary_dim", [0, 4, 16])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_heads_are_normed_and_the_first_of_their_dimensions_rotated(
    make, rotary_dim, with_norm, dtype
):
    world = AttentionCase(make, [11], [11], dtype=dtype)
    angles = torch.randn(11, rotary_dim // 2)
    sin, cos = angles.sin(), angles.cos()
    rotary = Rotary(torch.cat((cos, cos), 1).unsqueeze(1), torch.cat((-sin, sin), 1).unsqueeze(1))
    norm = HeadNorm(torch.rand(6, 16) + 0.5, torch.tensor(0.1)) if with_norm else None
    qkv = world.qkv[0]
    attended = world.plan([(0, 0, 11)]).attend(0, qkv.flatten(1).clone(), rotary, norm)
    heads = qkv[:, :6].float()
    if norm is not None:
        heads = heads / (heads.square().sum(-1, keepdim=True) + 0.01).sqrt() * norm.weight
    pairs = torch.complex(*heads[..., :rotary_dim].unflatten(-1, (2, rotary_dim // 2)).unbind(-2))
    turned = pairs * torch.polar(torch.ones(angles.shape), angles)[:, None]
    heads = torch.cat((turned.real, turned.imag, heads[..., rotary_dim:]), -1)
    for token in range(11):
        keys, values = heads[: token + 1, 4:], qkv[: token + 1, 6:].float()
        expected = brute_force(heads[token, :4], keys, values, world.spec)
        torch.testing.assert_close(
            attended[token].view(4, 16).float(), expected, **TOLERANCE[dtype]
        )


def test_layers_have_windows_and_caches_of_their_own(make):
    world = AttentionCase(make, [5], [30], windows=(6, 0))
    assert world.backend.block_bytes == sum(
        stored[0].nbytes for cache in world.backend.kv_caches for stored in cache.tensors
    )
    qkv, rotary = world.qkv[0].flatten(1), no_rotation(30, 16)
    plan = world.plan([(0, 0, 30)])
    results = [plan.attend(layer, qkv.clone(), rotary).view(30, 4, 16)[-5:] for layer in (0, 1)]
    torch.testing.assert_close(results[0], world.expected(), **TOLERANCE[torch.float32])
    world.spec = dataclasses.replace(world.spec, windows=(0, 0))
    torch.testing.assert_close(results[1], world.expected(), **TOLERANCE[torch.float32])


def test_rows_after_the_last_sequence_are_zero(make):
    world = AttentionCase(make, [1, 5], [9, 5])
    result = world.step([(0, 8, 9), (1, 0, 5)], num_padding=3)
    torch.testing.assert_close(result[:6], world.expected(), **TOLERANCE[torch.float32])
    assert torch.all(result[6:] == 0.0)


def test_queries_that_were_not_planned_for_are_refused(make):
    world = AttentionCase(make, [2], [9])
    plan, rotary = world.plan([(0, 7, 9)]), no_rotation(2, 16)
    for qkv in (torch.zeros(1, 128), torch.zeros(2, 112), torch.zeros(2, 128).half()):
        with pytest.raises(ValueError, match=r"planned for \[2, 128\] in torch.float32"):
            plan.attend(0, qkv, rotary)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "multiple of 2"),
        ({"scale": 0.0}, "must be above 0"),
        ({"kv_dtype": torch.float16}, "must agree"),
        ({"soft_cap": -1.0}, "0 or above"),
        ({"alibi_slopes": (0.5,)}, "1 alibi_slopes for 4 heads"),
    ],
)
def test_a_spec_that_nobody_computes_with_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionCase(ReferenceAttention, [1], [1], **fields)


def test_the_device_decides_which_backend_a_spec_gets():
    spec = AttentionCase(ReferenceAttention, [1], [1]).spec
    assert isinstance(make_backend(spec), TritonAttention if IS_INTERPRETED else CpuAttention)
    if not IS_INTERPRETED:
        other = dataclasses.replace(spec, device=torch.device("meta"))
        assert isinstance(make_backend(other), ReferenceAttention)
    gpu = dataclasses.replace(spec, device=torch.device("cuda"))
    assert isinstance(make_backend(gpu), TritonAttention)


def test_what_a_backend_cannot_do_is_refused():
    spec = AttentionCase(ReferenceAttention, [1], [1]).spec
    with pytest.raises(ValueError, match="float64"):
        CpuAttention(dataclasses.replace(spec, dtype=torch.float64, kv_dtype=torch.float64))
    with pytest.raises(ValueError, match="sinks"):
        CpuAttention(dataclasses.replace(spec, has_sinks=True))
    with pytest.raises(ValueError, match="float64"):
        TritonAttention(dataclasses.replace(spec, dtype=torch.float64, kv_dtype=torch.float64))
    with pytest.raises(ValueError, match="deterministic"):
        ReferenceAttention(dataclasses.replace(spec, is_deterministic=True))


@pytest.mark.parametrize("block", [-1, 1000])
@pytest.mark.parametrize("lens", [([1], [9]), ([5], [9])], ids=["decode", "chunk"])
def test_a_block_outside_the_cache_is_refused(make, lens, block):
    world = AttentionCase(make, *lens)
    world.block_table = np.full_like(world.block_table, block)
    with pytest.raises(IndexError):
        world.attend()
