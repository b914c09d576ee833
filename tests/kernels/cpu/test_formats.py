from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from pagoda_kernels.cpu.formats import (
    UNITS,
    VIEWS,
    floats,
    narrow,
    quantize,
    scale_row,
    widen,
    widen_to_bf16,
)
from pagoda_kernels.kv_cache import LARGEST, LEAST
from pagoda_kernels.kv_cache import quantize as quantize_reference


@njit
def narrow_all(source, target):
    narrow(source, target)


@njit
def widen_all(source, target):
    widen(source, target)


def test_numbers_are_rounded_to_bf16_as_torch_rounds_them():
    torch.manual_seed(0)
    # Random bits: every exponent, numbers below the normal ones, NaN, infinities.
    numbers = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int64).int()
    numbers = torch.cat((numbers, torch.tensor([0x3F808000, 0x3F818000, 0x7F800000, 0x7F7FFFFF])))
    x = numbers.int().view(torch.float32)
    bits = np.empty(len(x), np.uint16)
    narrow_all(x.numpy(), bits)
    rounded = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(rounded, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    wide = np.empty(len(x), np.float32)
    widen_all(bits, wide)
    torch.testing.assert_close(
        torch.from_numpy(wide), rounded.float(), rtol=0, atol=0, equal_nan=True
    )


ALL_CODES = torch.arange(256, dtype=torch.int16).to(torch.uint8)


@pytest.mark.parametrize("dtype", LARGEST)
def test_every_number_of_8_bits_is_widened_exactly(dtype):
    view, bf16 = VIEWS[dtype], VIEWS[torch.bfloat16]

    @njit
    def widen_codes(codes_at, count, wide_at, bf16_at, scaled_at):
        codes = view(codes_at, (count,))
        widen(codes, floats(wide_at, (count,)))
        widen_to_bf16(codes, bf16(bf16_at, (count,)))
        scale_row(codes, np.float32(0.5), floats(scaled_at, (count,)))

    numbers = ALL_CODES.view(dtype)
    is_number = numbers.float().isfinite()
    wide, scaled, halves = torch.empty(256), torch.empty(256), torch.empty(256).bfloat16()
    addresses = [tensor.data_ptr() for tensor in (numbers, wide, halves, scaled)]
    widen_codes(addresses[0], 256, *addresses[1:])
    for found, factor in ((wide, 1.0), (halves.float(), 1.0), (scaled, 2.0)):
        exact = found * factor * UNITS.get(dtype, 1.0)
        assert torch.equal(exact[is_number], numbers.float()[is_number])


@pytest.mark.parametrize("dtype", LARGEST)
def test_heads_are_rounded_to_8_bits_as_the_specification_rounds_them(dtype):
    view = VIEWS[dtype]

    @njit
    def quantize_rows(x_at, numbers_at, scales_at, num_rows, size, largest, least):
        x, numbers = floats(x_at, (num_rows, size)), view(numbers_at, (num_rows, size))
        scales = floats(scales_at, (num_rows,))
        for row in range(num_rows):
            scales[row] = quantize(x[row], numbers[row], largest, least)

    torch.manual_seed(0)
    # Of many sizes, so that many numbers are below the normal ones.
    x = torch.randn(4000, 72) * torch.exp2(torch.randint(-30, 5, (4000, 72)))
    x = torch.cat((x * torch.exp2(torch.randint(-60, 60, (4000, 1))), x.bfloat16().float()))
    halfway = torch.arange(0.5, 72.0) * LARGEST[dtype] / 127
    halfway[-1] = LARGEST[dtype]
    x = torch.cat((x, halfway[None], torch.zeros(1, 72)))
    expected, scales = quantize_reference(x, dtype)
    numbers, found_scales = torch.empty(x.shape, dtype=dtype), torch.empty(len(x))
    tensors = x, numbers, found_scales
    quantize_rows(*(t.data_ptr() for t in tensors), *x.shape, LARGEST[dtype], LEAST)
    assert torch.equal(numbers.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(found_scales, scales)
    assert (numbers.float() == 0).sum() > 1000
