from __future__ import annotations

import pytest
import torch

from pagoda_kernels.cpu.panels import INT8_AS_BF16, has_panels
from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.int8 import Int8Linear
from pagoda_runtime.quantization.parameter import Axis, Layout, Part

CPU = torch.device("cpu")


def create(layout, rank=0, size=1):
    placement = Placement(torch.bfloat16, CPU, Int8Linear, TensorParallel(rank, size))
    return Int8Linear(placement).create_weights(layout, has_bias=False)["weight"]


def test_a_matrix_is_rounded_as_it_is_loaded_and_nothing_is_held_in_bf16():
    torch.manual_seed(0)
    one, other = (torch.randn(100, 64) * 3).bfloat16(), torch.randn(40, 64).bfloat16()
    one[7] = 0.0
    weight = create(Layout([Part("one", 100), Part("other", 40)], 64))
    dict(weight.shards())["one"].load(one)
    dict(weight.shards())["other"].load(other)
    assert weight.data.dtype is torch.int8
    assert weight.num_bytes == 140 * (64 + 4)
    widened = weight.data.float() * weight.scales[:, None]
    error = (widened - torch.cat([one, other]).float()).abs()
    assert torch.all(error <= weight.scales[:, None] * 0.5001)
    assert torch.all(widened[7] == 0)
    assert weight.data[8].abs().max() == 127


@pytest.mark.parametrize("cut", Axis)
def test_a_rank_rounds_its_share(cut):
    torch.manual_seed(0)
    matrix = torch.randn(32, 64)
    shares = []
    for rank in range(2):
        weight = create(Layout([Part("a", 32)], 64, cut), rank, 2)
        dict(weight.shards())["a"].load(matrix)
        shares.append(weight.data.float() * weight.scales[:, None])
    whole = torch.cat(shares, 0 if cut is Axis.OUTPUT else 1)
    torch.testing.assert_close(whole, matrix, atol=0.02, rtol=0.0)


@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, "cpu"), (torch.bfloat16, "cuda")])
def test_what_the_format_needs_is_said(dtype, device):
    assert "--dtype bfloat16" in Int8Linear.unmet_need(dtype, torch.device(device))


@pytest.mark.skipif(not has_panels(INT8_AS_BF16), reason="this processor cannot widen int8")
@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_product_is_that_of_the_rounded_matrix(activation):
    torch.manual_seed(0)
    matrix, x = torch.randn(96, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    weight = create(Layout([Part("gate", 48), Part("up", 48)], 64))
    dict(weight.shards())["gate"].load(matrix[:48])
    dict(weight.shards())["up"].load(matrix[48:])
    method = Int8Linear(Placement(torch.bfloat16, CPU, Int8Linear), activation)
    method.after_loading({"weight": weight})
    expected = x.double() @ (weight.data.double() * weight.scales.double()[:, None]).T
    if activation:
        gate, up = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(method.apply(x).double(), expected, atol=0.05, rtol=0.02)
