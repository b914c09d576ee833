from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from pagoda_kernels.compiled import cache_folder, compiled, exp2, narrow, widen


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


def test_kernels_are_kept_by_their_contents(monkeypatch, tmp_path):
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path))
    folder = Path(cache_folder())
    assert folder.parent == tmp_path / "kernels"
    assert cache_folder() == str(folder)
    source = Path(sys.modules["pagoda_kernels.compiled"].__file__)
    copies = tmp_path / "source"
    shutil.copytree(source.parent, copies)
    (copies / "rms_norm" / "cpu.py").write_text("# another kernel")
    monkeypatch.setattr(sys.modules["pagoda_kernels.compiled"], "__file__", copies / "x.py")
    assert cache_folder() != str(folder)


def test_a_kernel_is_compiled_where_nothing_can_be_written(monkeypatch):
    import pagoda_kernels.compiled as module

    njit = module.njit

    def refuse_cache(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(module, "njit", refuse_cache)

    def double(x: int) -> int:
        return 2 * x

    assert compiled(double)(21) == 42
