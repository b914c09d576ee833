from __future__ import annotations

import pytest
import torch

from pagoda_kernels.kv_cache import (
    LARGEST,
    load_reference,
    make_kv_cache,
    quantize,
    store_reference,
    token_bytes,
)

# Half of the distance between two numbers, as a part of the larger one; of int8's largest number.
ERROR = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3, torch.int8: 1 / 254}


@pytest.mark.parametrize("dtype", LARGEST)
def test_a_stored_head_comes_back_within_half_a_step(dtype):
    torch.manual_seed(0)
    kv = torch.randn(3, 2, 2, 64) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None, None]
    kv_cache = make_kv_cache((2, 4, 2, 64), dtype, torch.device("cpu"))
    slots = torch.tensor([5, 1, 6])
    store_reference(kv_cache, slots, kv)
    most = kv.abs().amax(-1, keepdim=True)
    error = (load_reference(kv_cache, slots) - kv).abs()
    # Small numbers of fp8 have a step of their own, far below the largest number's.
    bound = ERROR[dtype] * (most if dtype is torch.int8 else kv.abs() + most / 2**8)
    assert torch.all(error <= bound * 1.0001)
    assert torch.all(error > 0.0).item() is False
    assert error.max() > 0.0


@pytest.mark.parametrize("dtype", LARGEST)
def test_the_largest_number_of_a_head_and_zeros_are_exact(dtype):
    x = torch.tensor([[0.0, -3.0, 1.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    numbers, scales = quantize(x, dtype)
    assert numbers[0, 1].float() == -LARGEST[dtype]
    assert torch.equal(numbers[1].float(), torch.zeros(4))
    torch.testing.assert_close(numbers[0, 1].float() * scales[0], x[0, 1])


def test_a_token_of_8_bits_takes_little_more_than_half_of_bf16():
    bf16 = token_bytes(8, 128, torch.bfloat16)
    assert bf16 == 2 * 8 * 128 * 2
    for dtype in LARGEST:
        assert bf16 / token_bytes(8, 128, dtype) > 1.9
