from __future__ import annotations

import pytest
import torch

from pagoda_kernels.norm import LayerNormWeights, RMSNormWeights, add_and_norm, norm

FLOOR, EPS = torch.tensor(1e-2), 1e-5
KINDS = ("rms", "layer")


def make_weights(kind, size):
    if kind is None:
        return None
    weight = torch.randn(size)
    if kind == "rms":
        return RMSNormWeights(weight, FLOOR)
    return LayerNormWeights(weight, torch.randn(size), EPS)


def exact(x, weights):
    x = x.double()
    if isinstance(weights, RMSNormWeights):
        length = torch.sqrt(x.square().sum(-1, keepdim=True) + weights.floor.double() ** 2)
        return x / length * weights.weight.double()
    centered = x - x.mean(-1, keepdim=True)
    deviation = torch.sqrt(centered.square().mean(-1, keepdim=True) + weights.eps)
    return centered / deviation * weights.weight.double() + weights.bias.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "size"), [(1, 640), (5, 48), (3, 7)])
def test_every_path_equals_the_definition(dtype, kind, rows, size):
    torch.manual_seed(0)
    x, weights = torch.randn(rows, size) * 3, make_weights(kind, size)
    tolerance = {"atol": 2e-6, "rtol": torch.finfo(dtype).eps}
    result = norm(x, weights, dtype)
    assert result.dtype is dtype
    torch.testing.assert_close(result.double(), exact(x, weights), **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_x", [None, *KINDS])
@pytest.mark.parametrize("of_total", [None, *KINDS])
def test_a_sum_and_its_norm(dtype, of_x, of_total):
    torch.manual_seed(0)
    total, x = torch.randn(5, 48), torch.randn(5, 48).to(dtype)
    of_x, of_total = make_weights(of_x, 48), make_weights(of_total, 48)
    expected = total.double() + (x if of_x is None else exact(x, of_x))
    result = add_and_norm(total, x, of_x, of_total)
    torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=1e-5)
    if of_total is None:
        assert result is total
    else:
        assert torch.equal(result, norm(total, of_total, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zeros_stay_zeros_and_nan_stays_nan(dtype):
    x = torch.zeros(2, 32)
    x[1, 3] = torch.nan
    result = norm(x, RMSNormWeights(torch.ones(32), FLOOR), dtype)
    assert torch.all(result[0] == 0)
    assert torch.all(result[1].isnan())


def test_tensors_that_do_not_fit_are_refused():
    x, weights = torch.zeros(4, 32), RMSNormWeights(torch.ones(32), FLOOR)
    with pytest.raises(ValueError, match="contiguous"):
        norm(torch.zeros(32, 4).T, weights, torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight \[16\]"):
        norm(x, RMSNormWeights(torch.ones(16), FLOOR), torch.bfloat16)
    with pytest.raises(ValueError, match="total"):
        add_and_norm(torch.zeros(3, 32), x.bfloat16(), weights, None)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [63, 640, 8192])
@pytest.mark.parametrize(
    ("of_x", "of_total"), [(None, None), (None, "rms"), ("rms", "rms"), ("layer", "layer")]
)
def test_a_gpu_gives_the_norms_of_the_cpu(of_x, of_total, size):
    torch.manual_seed(0)
    total, x = torch.randn(5, size), torch.randn(5, size).bfloat16()
    of_x, of_total = make_weights(of_x, size), make_weights(of_total, size)
    cuda = [None if of is None else on_cuda(of) for of in (of_x, of_total)]
    total_there = total.cuda()
    result = add_and_norm(total_there, x.cuda(), *cuda)
    expected = add_and_norm(total, x, of_x, of_total)
    torch.testing.assert_close(total_there.cpu(), total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.cpu(), expected, atol=1e-5, rtol=2**-7)


def on_cuda(weights):
    return type(weights)(*(w.cuda() if isinstance(w, torch.Tensor) else w for w in weights))
