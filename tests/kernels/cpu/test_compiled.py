from __future__ import annotations

import numpy as np
import torch

from pagoda_kernels.cpu.compiled import exp2, narrow, widen


def test_numbers_are_rounded_to_bf16_as_torch_rounds_them():
    torch.manual_seed(0)
    # Random bits: every exponent, numbers below the normal ones, NaN, infinities.
    numbers = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int64).int()
    numbers = torch.cat((numbers, torch.tensor([0x3F808000, 0x3F818000, 0x7F800000, 0x7F7FFFFF])))
    x = numbers.int().view(torch.float32)
    bits = np.empty(len(x), np.uint16)
    narrow(x.numpy(), bits)
    rounded = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(rounded, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    wide = np.empty(len(x), np.float32)
    widen(bits, wide)
    torch.testing.assert_close(
        torch.from_numpy(wide), rounded.float(), rtol=0, atol=0, equal_nan=True
    )


def test_powers_of_two_are_as_exact_as_bf16_weights_need():
    powers = np.linspace(-126, 126, 20_011, dtype=np.float32)
    found = np.array([exp2(power) for power in powers])
    np.testing.assert_allclose(found, np.exp2(powers.astype(np.float64)), rtol=1e-5)
    assert exp2(np.float32(-127.5)) == exp2(np.float32(-np.inf)) == 0.0
