from __future__ import annotations

import pytest
import torch

from pagoda_kernels.gated_activation import gated_activation
from pagoda_kernels.grouped_linear import GroupedShape, make_grouped_linear, triton_linear
from pagoda_kernels.grouped_linear.packing import PLANES
from pagoda_kernels.grouped_linear.reference import dequantize
from pagoda_kernels.grouped_linear.testing import random_matrix
from pagoda_kernels.grouped_linear.triton_linear import TritonGroupedLinear
from pagoda_kernels.quantized_linear import ReferenceLinear
from pagoda_kernels.testing import fill_linear

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
CPU = torch.device("cpu")


def make_linear(shape, matrix, dtype, bias=None, **options):
    is_symmetric = matrix.zeros is None
    linear = make_grouped_linear(
        shape, dtype=dtype, device=CPU, is_symmetric=is_symmetric, **options
    )
    assert isinstance(linear, TritonGroupedLinear)
    fill_linear(linear, matrix, bias, CPU)
    return linear


def assert_close(result, expected, dtype):
    assert result.dtype is dtype
    atol = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(result.double(), expected, atol=atol, rtol=0.0)


def assert_product(shape, num_rows, dtype=torch.float16, *, has_zeros=True, has_bias=False):
    torch.manual_seed(0)
    matrix = random_matrix(shape, has_zeros=has_zeros)
    bias = torch.randn(shape.outputs).to(dtype) if has_bias else None
    x = torch.randn(num_rows, shape.inputs).to(dtype)
    result = make_linear(shape, matrix, dtype, bias)(x)
    expected = x.double() @ dequantize(matrix, shape).double().T
    if bias is not None:
        expected += bias.double()
    assert_close(result, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("has_zeros", [False, True])
def test_numbers_of_every_width_give_the_product_that_they_stand_for(dtype, bits, has_zeros):
    assert_product(GroupedShape(40, 128, bits, 64), 3, dtype, has_zeros=has_zeros)


GROUPS = [(128, 16), (96, 32), (192, 64), (192, 96), (256, 128), (512, 256), (160, 160), (100, 100)]


@pytest.mark.parametrize(("inputs", "group_size"), GROUPS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_groups_of_every_size_keep_their_own_scales(inputs, group_size, bits):
    assert_product(GroupedShape(33, inputs, bits, group_size), 2)


@pytest.mark.parametrize("num_rows", [1, 8, 9, 16, 17, 33, 65])
def test_any_number_of_rows_is_multiplied(num_rows):
    assert_product(GroupedShape(130, 128, 4, 128), num_rows, has_bias=True)


@pytest.mark.parametrize("has_bias", [False, True])
def test_splits_add_up_to_the_whole(has_bias):
    # Eight steps are two splits, and 12 three.
    assert_product(GroupedShape(40, 1024, 4, 128), 2, has_bias=has_bias)
    assert_product(GroupedShape(40, 1500, 4, 1500), 2, has_bias=has_bias)


@pytest.mark.parametrize("inputs", [128, 1024])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_matrix_of_gate_and_up_is_activated(inputs, activation):
    torch.manual_seed(0)
    shape = GroupedShape(68, inputs, 4, 128)
    matrix, bias, x = random_matrix(shape, has_zeros=True), torch.randn(68), torch.randn(2, inputs)
    result = make_linear(shape, matrix, torch.float32, bias, activation=activation)(x)
    gate_up = x.double() @ dequantize(matrix, shape).double().T + bias
    assert result.shape == (2, 34)
    assert_close(result, gated_activation(gate_up.float(), activation).double(), torch.float32)


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_for_many_rows_the_matrix_is_widened_part_by_part(bits, has_bias, monkeypatch):
    monkeypatch.setattr(triton_linear, "_WIDENED_BYTES", 64 * 160 * 2)
    assert_product(GroupedShape(140, 160, bits, 32), 512, has_bias=has_bias)


def test_a_rows_bits_do_not_depend_on_a_neighbour():
    torch.manual_seed(0)
    shape = GroupedShape(40, 1024, 4, 128)
    linear = make_linear(shape, random_matrix(shape, has_zeros=True), torch.float16)
    x = torch.randn(8, 1024).half()
    assert torch.equal(linear(x)[3], linear(x[3:4])[0])


def test_a_matrix_takes_its_bits_and_little_more():
    shape = GroupedShape(256, 1024, 4, 128)
    linear = make_linear(shape, random_matrix(shape, has_zeros=True), torch.float16)
    assert linear.num_bytes == 256 * 1024 // 2 + 2 * 2 * 256 * 8


def test_groups_that_no_product_takes_are_multiplied_by_the_reference():
    shape = GroupedShape(8, 48, 4, 24)
    linear = make_grouped_linear(shape, dtype=torch.float16, device=CPU)
    assert isinstance(linear, ReferenceLinear)


def test_a_scale_that_does_not_fit_is_named():
    shape = GroupedShape(8, 128, 4, 128)
    matrix = random_matrix(shape, has_zeros=False)
    matrix.scales[3] = 300.0
    with pytest.raises(ValueError, match=r"300.0.*below 256"):
        make_linear(shape, matrix, torch.float16)


def test_rows_of_another_size_or_dtype_are_refused():
    shape = GroupedShape(8, 128, 4, 128)
    linear = make_linear(shape, random_matrix(shape, has_zeros=False), torch.float16)
    with pytest.raises(ValueError, match="128 columns"):
        linear(torch.zeros(1, 64, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"in torch.float16"):
        linear(torch.zeros(1, 128))
