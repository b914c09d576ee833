from __future__ import annotations

import pytest
import torch

from pagoda_kernels.norm import LayerNormWeights, RMSNormWeights, add_and_norm, norm
from pagoda_kernels.norm.reference import layer_norm_reference, rms_norm_reference
from pagoda_kernels.testing import watch_moves

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10}
SIZES = [1, 63, 100, 640, 4096]
KINDS = ("rms", "layer")


def make_weights(kind, size):
    if kind is None:
        return None
    weight = torch.randn(size)
    if kind == "rms":
        return RMSNormWeights(weight, torch.tensor(1e-2))
    return LayerNormWeights(weight, torch.randn(size), 1e-5)


def expected_norm(x, weights):
    if weights is None:
        return x.float()
    is_rms = isinstance(weights, RMSNormWeights)
    return (rms_norm_reference if is_rms else layer_norm_reference)(x, *weights)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_norms_equal_their_specification(dtype, size, kind):
    torch.manual_seed(0)
    x, weights = torch.randn(3, size) * 3 + 1, make_weights(kind, size)
    result = norm(x, weights, dtype)
    assert result.dtype is dtype
    expected = expected_norm(x, weights)
    torch.testing.assert_close(result.float(), expected, atol=1e-5, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("of_x", [None, *KINDS])
@pytest.mark.parametrize("of_total", [None, *KINDS])
def test_sums_and_their_norms_equal_their_specification(dtype, size, of_x, of_total):
    torch.manual_seed(0)
    total, x = torch.randn(3, size), torch.randn(3, size).to(dtype)
    of_x, of_total = make_weights(of_x, size), make_weights(of_total, size)
    expected = total + expected_norm(x, of_x)
    result = add_and_norm(total, x, of_x, of_total)
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
    if of_total is None:
        assert result is total
    else:
        assert result.dtype is dtype
        expected = expected_norm(total, of_total)
        torch.testing.assert_close(result.float(), expected, atol=1e-5, rtol=TOLERANCE[dtype])


def test_a_row_of_large_numbers_that_hardly_differ_has_an_exact_layer_norm():
    x = 1e4 + torch.arange(64.0)[None]
    weights = LayerNormWeights(torch.ones(64), torch.zeros(64), 1e-5)
    expected = layer_norm_reference(x - 1e4, *weights)
    torch.testing.assert_close(norm(x, weights, torch.float32), expected, atol=1e-4, rtol=1e-4)


def test_zeros_stay_zeros_and_nan_stays_in_its_row():
    x = torch.zeros(2, 48)
    x[1, 3] = torch.nan
    result = norm(x, make_weights("rms", 48), torch.float32)
    assert torch.all(result[0] == 0)
    assert torch.all(result[1].isnan())


def test_numbers_are_moved_once():
    total, x = torch.randn(3, 100), torch.randn(3, 100).half()
    with watch_moves() as moves:
        result = add_and_norm(total, x, make_weights("rms", 100), make_weights("rms", 100))
    for loaded in (total, x):
        assert torch.all(moves.loads(loaded) == 1)
    for stored in (total, result):
        assert torch.all(moves.stores(stored) == 1)
    assert moves.loads(result).sum() == moves.stores(x).sum() == 0
