from __future__ import annotations

import pytest
import torch

from pagoda_kernels.gated_activation import gated_activation
from pagoda_kernels.scaled_linear import Rounding, ScaledShape, make_scaled_linear
from pagoda_kernels.scaled_linear.reference import dequantize
from pagoda_kernels.scaled_linear.testing import random_matrix, round_rows
from pagoda_kernels.testing import fill_linear

CPU = torch.device("cpu")
DTYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def assert_product(shape, num_rows, rounding=Rounding.DYNAMIC, dtype=torch.float32, **options):
    torch.manual_seed(0)
    matrix = random_matrix(shape)
    x = (torch.randn(num_rows, shape.inputs) * 2).to(dtype)
    bias = torch.randn(shape.outputs).to(dtype)
    input_scale = torch.tensor(0.04) if rounding is Rounding.STATIC else None
    linear = make_scaled_linear(
        shape, rounding, dtype=dtype, device=CPU, input_scale=input_scale, **options
    )
    fill_linear(linear, matrix, bias, CPU)
    result = linear(x)
    assert result.dtype is dtype
    rows = round_rows(x, shape, rounding, input_scale)
    expected = rows.double() @ dequantize(matrix, shape).double().T + bias.double()
    if activation := options.get("activation"):
        expected = gated_activation(expected.float(), activation).double()
    atol = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(result.double(), expected, atol=atol, rtol=0.0)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inputs", "group_size"), [(256, 128), (200, 128), (100, 100)])
def test_products_are_of_the_rounded_rows(name, rounding, dtype, inputs, group_size):
    shape = ScaledShape(70, inputs, DTYPES[name], group_size)
    assert_product(shape, 3, rounding, dtype)


@pytest.mark.parametrize("num_rows", [1, 17, 65])
@pytest.mark.parametrize("name", DTYPES)
def test_any_number_of_rows_is_multiplied(num_rows, name):
    assert_product(ScaledShape(130, 128, DTYPES[name], 128), num_rows)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_splits_add_up_to_the_whole(name, activation):
    # Eight steps are two splits.
    assert_product(ScaledShape(40, 1024, DTYPES[name], 1024), 2, activation=activation)
    assert_product(ScaledShape(40, 1024, DTYPES[name], 128), 2, activation=activation)


def test_a_row_of_zeros_stays_one():
    shape = ScaledShape(40, 128, torch.int8, 128)
    linear = make_scaled_linear(shape, Rounding.DYNAMIC, dtype=torch.float32, device=CPU)
    fill_linear(linear, random_matrix(shape), None, CPU)
    assert torch.all(linear(torch.zeros(2, 128)) == 0)


def test_groups_of_another_size_are_refused():
    shape = ScaledShape(40, 128, torch.int8, 64)
    with pytest.raises(ValueError, match="64 of 128 columns"):
        make_scaled_linear(shape, Rounding.NONE, dtype=torch.float32, device=CPU)
