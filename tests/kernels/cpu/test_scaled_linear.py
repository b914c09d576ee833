from __future__ import annotations

import pytest
import torch

from pagoda_kernels.cpu.packed_linear import GATES
from pagoda_kernels.cpu.panels import describe_products
from pagoda_kernels.cpu.scaled_linear import PanelScaledLinear, has_scaled_panels
from pagoda_kernels.gated_activation import gated_activation
from pagoda_kernels.quantized_linear import ReferenceLinear
from pagoda_kernels.scaled_linear import Rounding, Scaled, ScaledShape, make_scaled_linear
from pagoda_kernels.scaled_linear.as_grouped import AsGroupedLinear
from pagoda_kernels.scaled_linear.reference import dequantize
from pagoda_kernels.scaled_linear.testing import random_matrix
from pagoda_kernels.testing import fill_linear

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not has_scaled_panels(ScaledShape(32, 32, E4M3, 32), BF16),
    reason="this processor does not widen e4m3 itself",
)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def make(shape, matrix, bias=None, activation=None):
    linear = PanelScaledLinear(shape, activation)
    fill_linear(linear, matrix, bias, CPU)
    return linear


def assert_rounded_once(result, exact, slack=2.0**-8):
    assert result.dtype is BF16
    torch.testing.assert_close(result.double(), exact, rtol=slack, atol=2e-4)


@pytest.mark.parametrize("num_rows", [1, 9])
def test_every_number_of_e4m3_is_widened_exactly(num_rows):
    codes = torch.zeros(256, 2, dtype=torch.uint8)
    codes[:, 1] = torch.arange(256)
    linear = make(ScaledShape(256, 2, E4M3, 2), Scaled(codes.view(E4M3), torch.ones(256, 1)))
    result = linear(torch.ones(num_rows, 2, dtype=BF16)).float()
    expected = codes[:, 1].view(E4M3).float().expand(num_rows, -1)
    torch.testing.assert_close(result, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(
    ("inputs", "group_size"), [(66, 66), (256, 256), (256, 128), (200, 128), (640, 128)]
)
@pytest.mark.parametrize("outputs", [1, 16, 31, 100])
@pytest.mark.parametrize("num_rows", [1, 3, 8, 45])
def test_a_product_is_exact_but_for_one_rounding(num_rows, outputs, inputs, group_size):
    shape = ScaledShape(outputs, inputs, E4M3, group_size)
    matrix, bias, x = random_matrix(shape), torch.randn(outputs), torch.randn(num_rows, inputs)
    exact = x.to(BF16).double() @ dequantize(matrix, shape).double().T + bias.to(BF16).double()
    assert_rounded_once(make(shape, matrix, bias.to(BF16))(x.to(BF16)), exact)


def test_a_number_that_there_is_not_is_in_every_result_that_it_is_in():
    shape = ScaledShape(40, 64, E4M3, 64)
    matrix = random_matrix(shape)
    matrix.numbers.view(torch.uint8)[17, 3] = 0x7F
    result = make(shape, matrix)(torch.randn(2, 64).to(BF16))
    assert result[:, 17].isnan().all()
    assert result.isnan().sum() == 2


@pytest.mark.parametrize("outputs", [16, 40])
@pytest.mark.parametrize("activation", GATES)
def test_a_gate_activates_and_multiplies_before_it_rounds(activation, outputs):
    shape = ScaledShape(2 * outputs, 256, E4M3, 128)
    matrix, bias = random_matrix(shape), torch.randn(2 * outputs).to(BF16)
    x = torch.randn(9, 256).to(BF16)
    exact = x.double() @ dequantize(matrix, shape).double().T + bias.double()
    result = make(shape, matrix, bias, activation)(x)
    assert_rounded_once(result, gated_activation(exact, activation), slack=2.0**-6)


@pytest.mark.parametrize("group_size", [128, 640])
def test_a_row_has_the_same_bits_whatever_its_neighbours(group_size):
    shape = ScaledShape(96, 640, E4M3, group_size)
    linear, x = make(shape, random_matrix(shape)), torch.randn(45, 640).to(BF16)
    together = linear(x)
    for first, last in ((0, 1), (3, 10), (8, 45), (20, 22), (0, 0)):
        assert torch.equal(linear(x[first:last]), together[first:last])
    assert linear.are_rows_alike


def test_a_matrix_is_held_in_8_bits():
    shape = ScaledShape(2048, 1024, E4M3, 128)
    linear = make(shape, random_matrix(shape))
    assert linear.num_bytes < 1.1 * shape.outputs * shape.inputs


def test_rows_that_do_not_fit_are_refused():
    shape = ScaledShape(32, 8, E4M3, 8)
    for x in (torch.zeros(2, 10, dtype=BF16), torch.zeros(2, 8)):
        with pytest.raises(ValueError, match="the matrix has 8 columns"):
            make(shape, random_matrix(shape))(x)


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        (ScaledShape(32, 200, E4M3, 128), BF16, PanelScaledLinear),
        (ScaledShape(32, 201, E4M3, 201), BF16, ReferenceLinear),
        (ScaledShape(32, 200, E4M3, 128), torch.float16, ReferenceLinear),
        (ScaledShape(32, 256, torch.int8, 128), BF16, AsGroupedLinear),
        (ScaledShape(32, 200, torch.int8, 200), torch.float32, AsGroupedLinear),
        (ScaledShape(32, 200, torch.int8, 128), BF16, ReferenceLinear),
    ],
)
def test_what_a_cpu_has_no_panels_for_is_widened_when_it_is_loaded(shape, dtype, kind):
    linear = make_scaled_linear(shape, Rounding.DYNAMIC, dtype=dtype, device=CPU)
    assert type(linear) is kind
    matrix, x = random_matrix(shape), torch.randn(3, shape.inputs).to(dtype)
    fill_linear(linear, matrix, None, CPU)
    exact = x.double() @ dequantize(matrix, shape).double().T
    assert torch.norm(linear(x).double() - exact) < 0.015 * torch.norm(exact)


def test_the_log_says_what_numbers_become():
    assert "8-bit floats widened in registers" in describe_products(BF16)
    widened = "widened to float16 when they were loaded"
    expected = f"Matrices of whole numbers are {widened}, those of 8-bit floats {widened}"
    assert describe_products(torch.float16) == expected
