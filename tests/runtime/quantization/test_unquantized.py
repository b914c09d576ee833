from __future__ import annotations

from functools import partial

import pytest
import torch

from pagoda_kernels.cpu.packed_linear import PackedLinear, can_pack
from pagoda_kernels.cpu.panels import BF16, has_panels
from pagoda_kernels.gated_activation import ACTIVATIONS, gated_activation
from pagoda_runtime.quantization import unquantized
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.parameter import Layout, Part
from pagoda_runtime.quantization.unquantized import (
    PrepackedLinear,
    UnquantizedLinear,
    make_product,
)

needs_panels = pytest.mark.skipif(
    not has_panels(BF16), reason="this processor has no panels of bf16"
)
needs_onednn = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 here"
)
METHODS = [PackedLinear, pytest.param(PrepackedLinear, marks=needs_onednn)]


def make_bf16(*size):
    return torch.randn(*size).bfloat16()


def make_deterministic(method, weight, activation, monkeypatch):
    """A product of this form, as a layer has it that must be deterministic."""
    monkeypatch.setattr(unquantized, "has_amx", lambda device: method is PrepackedLinear)
    placement = Placement(
        torch.bfloat16, torch.device("cpu"), UnquantizedLinear, is_deterministic=True
    )
    linear = UnquantizedLinear(placement, activation)
    layout = Layout([Part("", len(weight))], weight.shape[1])
    weights = linear.create_weights(layout, has_bias=False)
    weights["weight"].data.copy_(weight)
    linear.after_loading(weights)
    assert linear.is_packed
    return linear.apply


def test_fp32_is_multiplied_by_torch():
    assert isinstance(make_product(torch.randn(8, 4)), partial)


def test_bf16_is_packed_where_the_processor_multiplies_it(monkeypatch):
    weight = make_bf16(8, 4)
    monkeypatch.setattr(unquantized, "has_amx", lambda device: False)
    assert isinstance(make_product(weight), PackedLinear if can_pack(weight) else partial)
    if can_pack(weight):
        assert isinstance(make_product(weight, None, "silu"), PackedLinear)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        monkeypatch.setattr(unquantized, "has_amx", lambda device: True)
        assert isinstance(make_product(weight), PrepackedLinear)
        assert isinstance(make_product(weight, None, "silu"), PrepackedLinear)


@needs_panels
@pytest.mark.parametrize("rows", [1, 4, 17])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_packed_product_equals_torchs(method, rows, has_bias):
    torch.manual_seed(0)
    weight, x = make_bf16(96, 64), make_bf16(rows, 64)
    bias = make_bf16(96) if has_bias else None
    expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    result = method(weight, bias)(x)
    torch.testing.assert_close(result.double(), expected, atol=0.05, rtol=0.02)


@needs_panels
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", METHODS)
def test_a_packed_gate_equals_the_merged_one(gate, activation, has_bias):
    torch.manual_seed(0)
    weight = (torch.randn(192, 64) * 0.2).bfloat16()
    bias = (torch.randn(192) * 0.2).bfloat16() if has_bias else None
    x = make_bf16(5, 64)
    expected = gated_activation(torch.nn.functional.linear(x, weight, bias), activation)
    result = gate(weight, bias, activation)(x)
    torch.testing.assert_close(result, expected, atol=0.03, rtol=0.02)


def test_a_gate_is_merged_where_nothing_is_packed():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(12, 8), torch.randn(12), torch.randn(3, 8)
    gate, up = (x @ weight.T + bias).chunk(2, -1)
    result = make_product(weight, bias, "silu")(x)
    torch.testing.assert_close(result, torch.nn.functional.silu(gate) * up)


@needs_panels
@pytest.mark.parametrize("method", METHODS)
def test_with_fixed_rows_a_result_does_not_depend_on_other_rows(method, monkeypatch):
    torch.manual_seed(0)
    product = make_deterministic(method, make_bf16(96, 640), None, monkeypatch)
    x = make_bf16(37, 640)
    together = product(x)
    assert all(torch.equal(product(x[i : i + 1]), together[i : i + 1]) for i in range(37))


@needs_panels
@pytest.mark.parametrize("gate", METHODS)
def test_with_fixed_rows_a_gates_result_does_not_depend_on_other_rows(gate, monkeypatch):
    torch.manual_seed(0)
    weight = (torch.randn(192, 640) * 0.05).bfloat16()
    product, x = make_deterministic(gate, weight, "silu", monkeypatch), make_bf16(21, 640)
    together = product(x)
    assert all(torch.equal(product(x[i : i + 1]), together[i : i + 1]) for i in range(21))
