from __future__ import annotations

import copy

import pytest
import torch

from pagoda_kernels.kv_cache import LARGEST, KVCache, make_kv_cache, quantize
from pagoda_kernels.rotate_and_store import rotate_and_store
from pagoda_kernels.rotate_and_store.reference import rotate_and_store_reference
from pagoda_kernels.testing import watch_moves

TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float16: {"atol": 1e-3, "rtol": 2**-9},
}
SLOTS = [7, 0, 23, 9, 12]
HEAD_DIMS = [64, 80, 96, 112, 128, 192, 256]


def make_case(
    head_dim=64,
    rotary_dim=None,
    *,
    heads=4,
    kv_heads=2,
    dtype=torch.float32,
    kv_dtype=None,
    with_norm=False,
    slots=SLOTS,
):
    """Every slot that nobody wrote holds NaN, or in 8 bits all ones."""
    torch.manual_seed(0)
    angles = torch.randn(len(slots), 1, (rotary_dim or head_dim) // 2)
    cos, sin = angles.cos(), angles.sin()
    kv_cache = make_kv_cache((6, 4, kv_heads, head_dim), kv_dtype or dtype, torch.device("cpu"))
    for part in kv_cache.tensors:
        part.fill_(torch.nan if part.is_floating_point() else 255)
    return {
        "qkv": torch.randn(len(slots), heads + 2 * kv_heads, head_dim).to(dtype),
        "cos": torch.cat((cos, cos), -1),
        "sin": torch.cat((-sin, sin), -1),
        "kv_cache": kv_cache,
        "slot_mapping": torch.tensor(slots),
        "norm_weight": torch.rand(heads + kv_heads, head_dim) + 0.5 if with_norm else None,
        "norm_floor": torch.tensor(1e-3) if with_norm else None,
    }


def written(kv_cache: KVCache, slots=SLOTS):
    return [part.flatten(0, 1)[slots] for part in kv_cache.tensors]


def untouched(kv_cache: KVCache, slots=SLOTS):
    others = [slot for slot in range(24) if slot not in slots]
    return [part.flatten(0, 1)[others] for part in kv_cache.tensors]


def assert_as_specified(case, tolerance):
    ours, expected = copy.deepcopy(case), copy.deepcopy(case)
    rotate_and_store(**ours)
    rotate_and_store_reference(**expected)
    num_heads = case["qkv"].shape[1] - 2 * case["kv_cache"].numbers.shape[3]
    queries = (part["qkv"][:, :num_heads] for part in (ours, expected))
    torch.testing.assert_close(*queries, **tolerance)
    for name in (written, untouched):
        parts = zip(name(ours["kv_cache"]), name(expected["kv_cache"]), strict=True)
        for part, other in parts:
            torch.testing.assert_close(part, other, equal_nan=name is untouched, **tolerance)
    return ours


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_equals_the_specification(head_dim, with_norm, dtype):
    case = make_case(head_dim, dtype=dtype, with_norm=with_norm)
    ours = assert_as_specified(case, TOLERANCE[dtype])
    values = case["qkv"][:, 6:]
    assert torch.equal(written(ours["kv_cache"])[0][:, 1], values)


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 16), (80, 32), (96, 48), (112, 110)])
def test_a_part_of_a_head_is_rotated(head_dim, rotary_dim, with_norm):
    assert_as_specified(
        make_case(head_dim, rotary_dim, with_norm=with_norm), TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (20, 20), (33, 11)])
def test_any_number_of_heads(heads, kv_heads):
    case = make_case(96, heads=heads, kv_heads=kv_heads, with_norm=True)
    assert_as_specified(case, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kv_dtype", LARGEST)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (256, 256)])
def test_numbers_of_8_bits_are_those_of_the_specification(head_dim, rotary_dim, kv_dtype, dtype):
    # No rotation, and so no sums: the bits must agree.
    case = make_case(head_dim, rotary_dim, dtype=dtype, kv_dtype=kv_dtype)
    case["cos"].fill_(1.0)
    case["sin"].fill_(0.0)
    case["qkv"] *= torch.logspace(-4, 4, 5)[:, None, None]
    case["qkv"][1, 4:] = 0.0
    assert_as_specified(case, {"atol": 0, "rtol": 0})


@pytest.mark.parametrize("kv_dtype", LARGEST)
def test_rotated_keys_of_8_bits_are_within_a_step_of_the_specification(kv_dtype):
    case = make_case(128, kv_dtype=kv_dtype, with_norm=True)
    ours, expected = copy.deepcopy(case), copy.deepcopy(case)
    rotate_and_store(**ours)
    rotate_and_store_reference(**expected)
    (bits, scales), (others, other_scales) = (written(c["kv_cache"]) for c in (ours, expected))
    torch.testing.assert_close(scales, other_scales)
    difference = (bits.int() - others.int()).abs()
    assert torch.all((difference <= 1) | (difference == 255))
    assert (difference == 0).float().mean() > 0.999


@pytest.mark.parametrize("kv_dtype", LARGEST)
def test_every_half_between_two_numbers_is_rounded_to_the_even_one(kv_dtype):
    """A head of all numbers of the format, of all halves between two, and of the largest one."""
    bits = torch.arange(256, dtype=torch.uint8).view(kv_dtype).float()
    numbers = bits[bits.abs() <= LARGEST[kv_dtype]].sort().values
    halves = (numbers[1:] + numbers[:-1]) / 2
    rows = torch.cat((numbers, halves)).split(126)
    case = make_case(128, kv_heads=1, kv_dtype=kv_dtype, slots=list(range(len(rows))))
    case["cos"].fill_(1.0)
    case["sin"].fill_(0.0)
    for row, some in zip(case["qkv"][:, 4:], rows, strict=True):
        row[:] = torch.nn.functional.pad(some, (0, 128 - len(some)), value=LARGEST[kv_dtype])
    expected, scales = quantize(case["qkv"][:, 4:], kv_dtype)
    assert torch.all(scales == 1.0)
    rotate_and_store(**case)
    stored = written(case["kv_cache"], list(range(len(rows))))[0][:, :, 0]
    assert torch.equal(stored, expected.view(torch.uint8))


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
def test_tokens_whose_slot_is_outside_are_rotated_and_not_stored(kv_dtype):
    case = make_case(kv_dtype=kv_dtype)
    case["slot_mapping"] = torch.tensor([7, -1, 24, 1 << 40, 12])
    whole = make_case(kv_dtype=kv_dtype)
    rotate_and_store(**case)
    rotate_and_store(**whole)
    assert torch.equal(case["qkv"][:, :4], whole["qkv"][:, :4])
    ours, expected = (written(c["kv_cache"], [7, 12]) for c in (case, whole))
    for part, other in zip(ours, expected, strict=True):
        assert torch.equal(part, other)
    for part in untouched(case["kv_cache"], [7, 12]):
        assert torch.all(part.isnan() if part.is_floating_point() else part == 255)


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float8_e4m3fn])
def test_each_value_is_moved_once(kv_dtype):
    case = make_case(96, 64, dtype=torch.float16, kv_dtype=kv_dtype, with_norm=True)
    with watch_moves() as moves:
        rotate_and_store(**case)
    qkv, stores = case["qkv"], moves.stores(case["qkv"])
    assert torch.all(moves.loads(qkv) == 1)
    assert torch.all(stores[:, :4] == 1)
    assert torch.all(stores[:, 4:] == 0)
    for part in case["kv_cache"].tensors:
        assert torch.all(moves.stores(part).flatten(0, 1)[SLOTS] == 1)
        assert moves.stores(part).sum() == part[0, 0].numel() * len(SLOTS)
        assert moves.loads(part).sum() == 0


def test_no_tokens_are_none():
    case = make_case(slots=[]) | {"slot_mapping": torch.empty(0, dtype=torch.int64)}
    rotate_and_store(**case)
    assert all(torch.all(part.isnan()) for part in case["kv_cache"].tensors)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
def test_slots_beyond_2_to_the_31_numbers_are_stored(kv_dtype):
    """Pages that nobody touches take no memory."""
    case = make_case(kv_dtype=kv_dtype)
    num_blocks = (1 << 31) // (4 * 2 * 2 * 64) + 6
    far = make_kv_cache((num_blocks, 4, 2, 64), kv_dtype, torch.device("cpu"))
    slots = torch.tensor(SLOTS) + 4 * (num_blocks - 6)
    rotate_and_store(**copy.deepcopy(case) | {"kv_cache": far, "slot_mapping": slots})
    rotate_and_store(**case)
    for part, other in zip(written(far, slots), written(case["kv_cache"]), strict=True):
        assert torch.equal(part, other)
