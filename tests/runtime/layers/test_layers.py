from __future__ import annotations

import math

import pytest
import torch

from pagoda_kernels.cpu.packed_linear import can_pack
from pagoda_kernels.cpu.panels import BF16, has_panels
from pagoda_runtime.layers import linear
from pagoda_runtime.layers.activation import ACTIVATIONS
from pagoda_runtime.layers.embedding import Embedding
from pagoda_runtime.layers.linear import (
    Linear,
    PackedLinear,
    PlainLinear,
    PrepackedLinear,
    fix_rows,
    make_linear_method,
)
from pagoda_runtime.layers.mlp import MergedGate, PackedGate, PrepackedGate
from pagoda_runtime.layers.norm import RMSNorm

CPU = torch.device("cpu")
needs_panels = pytest.mark.skipif(
    not has_panels(BF16), reason="this processor does not multiply bf16 itself"
)


def make_norm(weight, offset=0.0):
    norm = RMSNorm(len(weight), eps=1e-6, weight_offset=offset, dtype=weight.dtype, device=CPU)
    norm.weight.copy_(weight)
    norm.after_loading()
    return norm


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_equals_its_definition(scale, offset):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 48) * scale, torch.randn(48)
    expected = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (weight + offset)
    norm = make_norm(weight, offset)
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-5)
    total = torch.ones(5, 48)
    norm.add_to(total, x)
    torch.testing.assert_close(total, expected + 1, atol=1e-5, rtol=1e-5)


def test_a_row_of_zeros_stays_zero():
    assert torch.all(make_norm(torch.ones(8))(torch.zeros(2, 8)) == 0)


def test_one_plus_a_small_bf16_weight_is_not_rounded_away():
    weight = torch.full((64,), 1e-3, dtype=torch.bfloat16)
    assert make_norm(weight, 1.0).weight[0].item() / 8 == pytest.approx(1.001, abs=1e-5)


def test_merged_shards_are_views_of_one_weight():
    layer = Linear(4, {"q": 3, "k": 2}, bias=True, dtype=torch.float32, device=CPU)
    targets = layer.targets("a.")
    assert set(targets) == {"a.q.weight", "a.q.bias", "a.k.weight", "a.k.bias"}
    for index, target in enumerate(targets.values()):
        target.fill_(index)
    layer.after_loading()
    out = layer(torch.ones(1, 4))
    assert out.tolist() == [[1.0, 1.0, 1.0, 11.0, 11.0]]


def test_fp32_is_multiplied_by_torch():
    assert isinstance(make_linear_method(torch.randn(8, 4)), PlainLinear)


def test_bf16_is_packed_where_the_processor_multiplies_it(monkeypatch):
    weight = torch.randn(8, 4).bfloat16()
    monkeypatch.setattr(linear, "has_amx", lambda device: False)
    packed = PackedLinear if can_pack(weight) else PlainLinear
    assert isinstance(make_linear_method(weight), packed)
    monkeypatch.setattr(linear, "has_amx", lambda device: True)
    assert isinstance(make_linear_method(weight), PrepackedLinear)


def make_bf16(*size):
    return torch.randn(*size).bfloat16()


METHODS = [PackedLinear, PrepackedLinear]
GATES = [PackedGate, PrepackedGate]


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
@pytest.mark.parametrize("gate", GATES)
def test_a_packed_gate_equals_the_merged_one(gate, activation, has_bias):
    torch.manual_seed(0)
    layer = Linear(64, {"gate": 96, "up": 96}, bias=has_bias, dtype=torch.bfloat16, device=CPU)
    for target in layer.targets("").values():
        target.copy_(torch.randn(target.shape) * 0.2)
    x = make_bf16(5, 64)
    expected = MergedGate(layer, activation)(x)
    torch.testing.assert_close(gate(layer, activation)(x), expected, atol=0.03, rtol=0.02)


@needs_panels
@pytest.mark.parametrize("method", METHODS)
def test_with_fixed_rows_a_result_does_not_depend_on_other_rows(method):
    torch.manual_seed(0)
    product, x = fix_rows(method(make_bf16(96, 640))), make_bf16(37, 640)
    together = product(x)
    assert all(torch.equal(product(x[i : i + 1]), together[i : i + 1]) for i in range(37))


@needs_panels
@pytest.mark.parametrize("gate", GATES)
def test_with_fixed_rows_a_gates_result_does_not_depend_on_other_rows(gate):
    torch.manual_seed(0)
    layer = Linear(640, {"gate": 96, "up": 96}, bias=False, dtype=torch.bfloat16, device=CPU)
    layer.weight.copy_(torch.randn(layer.weight.shape) * 0.05)
    product, x = gate(layer, "silu"), make_bf16(21, 640)
    product.fix_rows()
    together = product(x)
    assert all(torch.equal(product(x[i : i + 1]), together[i : i + 1]) for i in range(21))


def test_the_scale_of_an_embedding_is_rounded_to_its_dtype():
    embedding = Embedding(4, 2, scale=math.sqrt(640), dtype=torch.bfloat16, device=CPU)
    embedding.weight.fill_(1.0)
    assert embedding(torch.tensor([3]))[0, 0].item() == 25.25
