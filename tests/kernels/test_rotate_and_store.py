from __future__ import annotations

import copy
import math

import pytest
import torch

from pagoda_kernels.kv_cache import LARGEST, KVCache, load_reference, make_kv_cache
from pagoda_kernels.rotate_and_store import rotate_and_store
from pagoda_kernels.rotate_and_store.reference import apply_rotary, rotate_and_store_reference


def make_case(*, heads=4, kv_heads=2, head_dim=16, dtype=torch.bfloat16, with_norm=True):
    torch.manual_seed(0)
    num_tokens, block_size = 5, 4
    angles = torch.randn(num_tokens, 1, head_dim)
    case = {
        "qkv": torch.randn(num_tokens, heads + 2 * kv_heads, head_dim).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "kv_cache": KVCache(torch.zeros(6, block_size, 2, kv_heads, head_dim, dtype=dtype), None),
        "slot_mapping": torch.tensor([7, 0, 23, 9, 12]),
        "norm_weight": None,
        "norm_floor": None,
    }
    if with_norm:
        case["norm_weight"] = torch.rand(heads + kv_heads, head_dim) + 0.5
        case["norm_floor"] = torch.tensor(1e-3)
    return case


def copied(case):
    return copy.deepcopy(case)


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 6), (4, 4, 64)])
def test_the_compiled_kernel_equals_the_specification(with_norm, heads, kv_heads, head_dim):
    case = make_case(heads=heads, kv_heads=kv_heads, head_dim=head_dim, with_norm=with_norm)
    ours, expected = copied(case), copied(case)
    rotate_and_store(**ours)
    rotate_and_store_reference(**expected)
    tolerance = {"atol": 1e-6, "rtol": 2**-7}
    queries = slice(0, heads)
    torch.testing.assert_close(ours["qkv"][:, queries], expected["qkv"][:, queries], **tolerance)
    torch.testing.assert_close(ours["kv_cache"].numbers, expected["kv_cache"].numbers, **tolerance)
    values = case["qkv"][:, heads + kv_heads :]
    flat = ours["kv_cache"].numbers.flatten(0, 1)
    assert torch.equal(flat[case["slot_mapping"], 1], values)
    untouched = torch.ones(len(flat), dtype=torch.bool)
    untouched[case["slot_mapping"]] = False
    assert torch.all(flat[untouched] == 0)


def test_rotation_turns_pairs_of_dimensions_by_position_times_frequency():
    angles = 3 * torch.tensor([1.0, 0.1, 1.0, 0.1]).view(1, 1, 4)
    sin = angles.sin() * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    expected = [math.cos(3), -2 * math.sin(0.3), math.sin(3), 2 * math.cos(0.3)]
    torch.testing.assert_close(apply_rotary(x, angles.cos(), sin).flatten(), torch.tensor(expected))


@pytest.mark.parametrize("slot", [-1, 24])
def test_a_slot_outside_the_cache_is_refused(slot):
    case = make_case()
    case["slot_mapping"][3] = slot
    with pytest.raises(IndexError, match="outside the cache"):
        rotate_and_store(**case)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cos", torch.zeros(5, 1, 8), "cos"),
        ("slot_mapping", torch.zeros(4, dtype=torch.int64), "slot_mapping"),
        ("norm_weight", torch.zeros(4, 16), "norm_weight"),
        ("qkv", torch.zeros(5, 16, 8, dtype=torch.bfloat16).transpose(1, 2), "contiguous"),
        ("kv_cache", KVCache(torch.zeros(6, 4, 2, 2, 16), None), "dtype"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        rotate_and_store(**(make_case() | {name: value}))


def no_rotation(num_tokens, head_dim=8):
    shape = (num_tokens, 1, head_dim)
    return torch.ones(shape), torch.zeros(shape)


@pytest.mark.parametrize("store", [rotate_and_store, rotate_and_store_reference])
def test_each_token_goes_to_its_slot_and_nothing_else_changes(store):
    cache = torch.full((5, 4, 2, 3, 8), torch.nan)
    qkv = torch.randn(3, 9, 8)
    kv = qkv[:, 3:].clone().view(3, 2, 3, 8)
    store(qkv, *no_rotation(3), KVCache(cache, None), torch.tensor([17, 4, 6]), None, None)
    torch.testing.assert_close(cache[4, 1], kv[0])
    torch.testing.assert_close(cache[1, 0], kv[1])
    torch.testing.assert_close(cache[1, 2], kv[2])
    assert int(cache.isnan().sum()) == (5 * 4 - 3) * 2 * 3 * 8


@pytest.mark.parametrize(
    ("qkv", "slots", "message"),
    [
        (torch.zeros(1, 9, 10), torch.tensor([4]), "must agree"),
        (torch.zeros(1, 9, 8).half(), torch.tensor([4]), "must agree"),
        (torch.zeros(1, 9, 8), torch.tensor([4, 5]), "must be int64"),
        (torch.zeros(1, 9, 8), torch.tensor([4], dtype=torch.int32), "must be int64"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(qkv, slots, message):
    cache = KVCache(torch.zeros(5, 4, 2, 3, 8), None)
    with pytest.raises(ValueError, match=message):
        rotate_and_store(qkv, *no_rotation(1), cache, slots)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, *LARGEST])
@pytest.mark.parametrize("head_dim", [96, 128, 256])
def test_a_gpu_stores_what_the_specification_does(head_dim, kv_dtype):
    case = make_case(head_dim=head_dim)
    case["cos"][..., head_dim // 2 :] = case["cos"][..., : head_dim // 2]
    case["sin"][..., head_dim // 2 :] = -case["sin"][..., : head_dim // 2]
    case["kv_cache"] = make_kv_cache((6, 4, 2, head_dim), kv_dtype, torch.device("cpu"))
    there = {name: on_cuda(value) for name, value in case.items()}
    rotate_and_store(**there)
    rotate_and_store_reference(**case)
    tolerance = {"atol": 1e-6, "rtol": 2**-7}
    torch.testing.assert_close(there["qkv"][:, :4].cpu(), case["qkv"][:, :4], **tolerance)
    slots = case["slot_mapping"]
    ours = load_reference(there["kv_cache"], slots.cuda()).cpu()
    expected = load_reference(case["kv_cache"], slots)
    # A key that a rounding of bf16 has moved may be the next number of the format.
    step = 2**-2 if kv_dtype is torch.float8_e5m2 else 2**-3
    torch.testing.assert_close(ours, expected, atol=0.05, rtol=step)
    assert torch.equal(ours[:, 1], expected[:, 1])


def on_cuda(value):
    if isinstance(value, KVCache):
        return KVCache(*(None if part is None else part.cuda() for part in value))
    return value.cuda() if isinstance(value, torch.Tensor) else value
