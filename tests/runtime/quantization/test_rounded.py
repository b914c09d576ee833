from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from pagoda_kernels.grouped_linear import Grouped, GroupedShape
from pagoda_kernels.grouped_linear.reference import dequantize
from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.by_module import get_linear_method
from pagoda_runtime.quantization.config import ONLINE, online
from pagoda_runtime.quantization.parameter import Axis, Layout, Part
from pagoda_runtime.quantization.rounded import INT4_GROUP_SIZE, to_fp8, to_int4, to_int8

CPU = torch.device("cpu")
# The largest error beside the largest number of a row, or a group.
STEPS = {"int8": 0.5001 / 127, "int4": 1 / 15, "fp8": 1 / 16}


def widen(grouped: Grouped, bits: int, group_size: int) -> torch.Tensor:
    shape = GroupedShape(*grouped.integers.shape, bits, group_size)
    return dequantize(grouped, shape)


def make(name, layout, matrices, *, rank=0, size=1, activation=None, dtype=torch.float32):
    parallel = TensorParallel(rank, size)
    placement = Placement(dtype, CPU, get_linear_method(online(name)), parallel, path="layer")
    method = placement.method(placement, activation)
    weight = method.create_weights(layout, has_bias=False)["weight"]
    for part, shard in weight.shards():
        shard.load(matrices[part])
    assert weight.num_bytes == 0
    method.after_loading({"weight": weight})
    return method


def test_int8_has_a_scale_for_each_row():
    torch.manual_seed(0)
    matrix = torch.randn(40, 64) * 3
    matrix[7] = 0.0
    rounded = to_int8(matrix)
    assert (widen(rounded, 8, 64) - matrix).abs().amax(1).le(rounded.scales[:, 0] * 0.5001).all()
    assert torch.all(rounded.integers[7] == 128)
    assert (rounded.integers.int() - 128).abs().amax(1).eq(127).sum() == 39


def test_int4_has_a_scale_and_a_zero_for_each_group():
    torch.manual_seed(0)
    matrix = torch.randn(40, 96)
    matrix[7, :32] = 0.0
    matrix[8, :32] = 3.0 + torch.arange(32) * 1e-4
    matrix[9, :32] = torch.arange(32) % 16 * 0.5 - 2
    rounded = to_int4(matrix)
    assert int(rounded.integers.max()) <= 15
    # So that fp16 has them to a small part of a step.
    assert rounded.zeros.abs().max() < 48
    groups, widened = (
        t.view(40, 3, INT4_GROUP_SIZE) for t in (matrix, widen(rounded, 4, INT4_GROUP_SIZE))
    )
    span = groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)
    assert (widened - groups).abs().amax(2).le(span * STEPS["int4"]).all()
    assert torch.all(widened[7, 0] == 0)
    torch.testing.assert_close(widened[8:10, 0], groups[8:10, 0], atol=1e-3, rtol=1e-3)


def test_int4_is_closer_than_what_only_spans_each_group():
    torch.manual_seed(0)
    matrix = torch.randn(64, 256)
    groups = matrix.view(64, -1, INT4_GROUP_SIZE)
    least, largest = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scales = (largest - least) / 15
    spanned = ((groups - least) / scales).round() * scales + least
    found = widen(to_int4(matrix), 4, INT4_GROUP_SIZE).view_as(groups)
    assert (found - groups).norm() < 0.95 * (spanned - groups).norm()


def test_fp8_has_a_scale_for_each_row():
    torch.manual_seed(0)
    matrix = torch.randn(40, 64)
    rounded = to_fp8(matrix)
    widened = rounded.numbers.float() * rounded.scales
    torch.testing.assert_close(widened, matrix, rtol=1 / 16, atol=1e-3)
    torch.testing.assert_close(widened.abs().amax(1), matrix.abs().amax(1))


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_close_to_the_one_that_it_was_rounded_from(name, activation, dtype):
    torch.manual_seed(0)
    # The last group is not whole.
    matrices = {part: (torch.randn(48, 72) * 0.2).bfloat16() for part in ("gate", "up")}
    layout = Layout([Part(name, 48) for name in matrices], 72)
    x = torch.randn(5, 72).to(dtype)
    method = make(name, layout, matrices, activation=activation, dtype=dtype)
    expected = x.float() @ torch.cat([*matrices.values()]).float().T
    if activation:
        gate, up = expected.chunk(2, -1)
        expected = silu(gate) * up
    error = (method.apply(x).float() - expected).norm() / expected.norm()
    assert 0 < error < {"int8": 0.02, "int4": 0.15, "fp8": 0.05}[name]


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("cut", Axis)
def test_a_rank_rounds_its_share(name, cut):
    torch.manual_seed(0)
    matrix, x = torch.randn(32, 128), torch.randn(3, 128)
    layout = Layout([Part("a", 32)], 128, cut)
    results = []
    for rank in range(2):
        own = layout.own(Axis.INPUT, layout.parts[0], TensorParallel(rank, 2))
        method = make(name, layout, {"a": matrix}, rank=rank, size=2)
        results.append(method.apply(x[:, own.start : own.stop]))
    result = torch.cat(results, 1) if cut is Axis.OUTPUT else sum(results)
    one = make(name, Layout([Part("a", 32)], 128), {"a": matrix}).apply(x)
    if cut is Axis.OUTPUT or name == "int4":
        # The same groups are rounded alike.
        torch.testing.assert_close(result, one)
    expected = x @ matrix.T
    assert (result - expected).norm() / expected.norm() < 0.15


@pytest.mark.parametrize("name", ONLINE)
def test_the_vocabulary_stays_as_it_is(name):
    assert online(name).scheme_of("lm_head") is None
    assert online(name).scheme_of("model.layers.0.mlp.down_proj") == ONLINE[name]


@pytest.mark.parametrize("name", ONLINE)
def test_values_are_not_rounded_to_int4(name):
    found = online(name).scheme_of("model.layers.0.self_attn.v_proj")
    assert found == ONLINE["int8" if name == "int4" else name]
