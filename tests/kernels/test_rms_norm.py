from __future__ import annotations

import pytest
import torch

from pagoda_kernels.rms_norm import add_rms_norm, rms_norm

FLOOR = torch.tensor(1e-2)


def exact(x, weight):
    norm = torch.sqrt(x.double().square().sum(-1, keepdim=True) + FLOOR.double() ** 2)
    return x.double() / norm * weight.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "size"), [(1, 640), (5, 48), (3, 7)])
def test_every_path_equals_the_definition(dtype, rows, size):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, size) * 3, torch.randn(size)
    tolerance = {"atol": 1e-6, "rtol": torch.finfo(dtype).eps}
    expected = exact(x, weight)
    result = rms_norm(x, weight, FLOOR, dtype)
    assert result.dtype is dtype
    torch.testing.assert_close(result.double(), expected, **tolerance)
    total = torch.randn(rows, size)
    expected = total.double() + exact(x.to(dtype), weight)
    add_rms_norm(total, x.to(dtype), weight, FLOOR)
    torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zeros_stay_zeros_and_nan_stays_nan(dtype):
    x = torch.zeros(2, 32)
    x[1, 3] = torch.nan
    result = rms_norm(x, torch.ones(32), FLOOR, dtype)
    assert torch.all(result[0] == 0)
    assert torch.all(result[1].isnan())


def test_tensors_that_do_not_fit_are_refused():
    x = torch.zeros(4, 32)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(torch.zeros(32, 4).T, torch.ones(32), FLOOR, torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight \[16\]"):
        rms_norm(x, torch.ones(16), FLOOR, torch.bfloat16)
    with pytest.raises(ValueError, match="total"):
        add_rms_norm(torch.zeros(3, 32), x.bfloat16(), torch.ones(32), FLOOR)
