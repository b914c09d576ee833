"""Products with quantized matrices: of a CPU, and of a GPU in bf16."""

from __future__ import annotations

import pytest
import torch

from pagoda_kernels.gated_activation import gated_activation
from pagoda_kernels.grouped_linear import GroupedShape, make_grouped_linear
from pagoda_kernels.grouped_linear.packing import PLANES
from pagoda_kernels.grouped_linear.reference import dequantize as dequantize_grouped
from pagoda_kernels.grouped_linear.testing import random_matrix as random_grouped
from pagoda_kernels.launch import LaunchRecorder
from pagoda_kernels.scaled_linear import Rounding, ScaledShape, make_scaled_linear
from pagoda_kernels.scaled_linear.reference import dequantize as dequantize_scaled
from pagoda_kernels.scaled_linear.testing import random_matrix as random_scaled
from pagoda_kernels.scaled_linear.testing import round_rows
from pagoda_kernels.scaled_linear.triton_linear import TritonScaledLinear, has_torch_product
from pagoda_kernels.testing import fill_linear

CPU = torch.device("cpu")
ROWS = [1, 8, 16, 17, 64, 100, 600]


def assert_close(result, expected):
    atol = 2**-7 * float(expected.abs().max())
    torch.testing.assert_close(result.cpu().float(), expected, atol=atol, rtol=0.0)


def assert_grouped(shape, num_rows, device, dtype=torch.bfloat16, *, has_zeros=True, **options):
    torch.manual_seed(0)
    matrix = random_grouped(shape, has_zeros=has_zeros)
    x, bias = torch.randn(num_rows, shape.inputs).to(dtype), torch.randn(shape.outputs).to(dtype)
    linear = make_grouped_linear(
        shape, dtype=dtype, device=device, is_symmetric=not has_zeros, **options
    )
    fill_linear(linear, matrix, bias, device)
    expected = x.float() @ dequantize_grouped(matrix, shape).T + bias.float()
    if activation := options.get("activation"):
        expected = gated_activation(expected, activation)
    assert_close(linear(x.to(device)), expected)


def assert_scaled(shape, num_rows, rounding, device):
    torch.manual_seed(0)
    matrix = random_scaled(shape)
    x = torch.randn(num_rows, shape.inputs).bfloat16()
    bias = torch.randn(shape.outputs).bfloat16()
    input_scale = torch.tensor(0.04) if rounding is Rounding.STATIC else None
    linear = make_scaled_linear(
        shape,
        rounding,
        dtype=torch.bfloat16,
        device=device,
        input_scale=None if input_scale is None else input_scale.to(device),
    )
    fill_linear(linear, matrix, bias, device)
    # A CPU does not round rows, nor does a GPU that has no products of e4m3.
    if not isinstance(linear, TritonScaledLinear):
        rounding = Rounding.NONE
    rows = round_rows(x, shape, rounding, input_scale)
    expected = rows @ dequantize_scaled(matrix, shape).T + bias.float()
    assert_close(linear(x.to(device)), expected)


@pytest.mark.parametrize("rounding", Rounding)
def test_a_cpu_multiplies_by_what_numbers_of_8_bits_stand_for(rounding):
    assert_scaled(ScaledShape(40, 256, torch.float8_e4m3fn, 128), 3, rounding, CPU)
    assert_scaled(ScaledShape(40, 100, torch.int8, 100), 3, rounding, CPU)


def launched(make, num_rows, inputs):
    """The kernels of a product on a GPU that is not there."""
    with LaunchRecorder() as recorder:
        linear = make(torch.device("cuda"))
        linear.finish(None)
        linear(torch.empty(num_rows, inputs, dtype=torch.bfloat16, device="cuda"))
    return [launch.kernel.fn.__name__ for launch in recorder.launches]


def launched_by_grouped(num_rows, outputs=4096, bits=4):
    shape = GroupedShape(outputs, 4096, bits, 128)
    return launched(
        lambda device: make_grouped_linear(shape, dtype=torch.bfloat16, device=device),
        num_rows,
        4096,
    )


def launched_by_scaled(num_rows, dtype, rounding, inputs=4096):
    shape = ScaledShape(1 << 16, inputs, dtype, inputs)
    return launched(
        lambda device: make_scaled_linear(shape, rounding, dtype=torch.bfloat16, device=device),
        num_rows,
        inputs,
    )


def test_few_rows_are_split_where_there_are_few_outputs():
    assert launched_by_grouped(1) == ["product_kernel", "add_splits_kernel"]
    assert launched_by_grouped(1, outputs=1 << 16) == ["product_kernel"]


def test_for_many_rows_the_matrix_is_widened_32_mib_at_a_time():
    assert launched_by_grouped(255, outputs=1 << 16) == ["product_kernel"]
    assert launched_by_grouped(256, outputs=14336) == ["widen_kernel"] * 4
    assert launched_by_grouped(64, bits=3) == ["widen_kernel"]


def test_torch_multiplies_many_rows_of_e4m3():
    dynamic = Rounding.DYNAMIC
    assert launched_by_scaled(17, torch.float8_e4m3fn, dynamic) == ["round_kernel"]
    product = ["round_kernel", "scaled_product_kernel"]
    assert launched_by_scaled(16, torch.float8_e4m3fn, dynamic) == product
    assert launched_by_scaled(17, torch.float8_e4m3fn, dynamic, inputs=4104) == product
    assert launched_by_scaled(17, torch.int8, dynamic) == product


@pytest.mark.parametrize(
    ("inputs", "group_size", "capability", "expected"),
    [
        (640, 640, (9, 0), True),
        (640, 640, (12, 0), True),
        (640, 640, (8, 9), False),
        (648, 648, (9, 0), False),
        (640, 128, (10, 0), False),
        (648, 128, (9, 0), False),
        (640, 128, (9, 0), False),
    ],
)
def test_torch_has_products_of_sizes_that_it_takes(inputs, group_size, capability, expected):
    shape = ScaledShape(64, inputs, torch.float8_e4m3fn, group_size)
    assert has_torch_product(shape, capability) is expected


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_rows_that_are_not_to_be_rounded_are_not(dtype):
    assert launched_by_scaled(8, dtype, Rounding.NONE) == ["product_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("has_zeros", [False, True])
def test_a_gpu_multiplies_by_numbers_of_every_width(dtype, bits, has_zeros):
    shape = GroupedShape(300, 512, bits, 64)
    for num_rows in ROWS:
        assert_grouped(shape, num_rows, torch.device("cuda"), dtype, has_zeros=has_zeros)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("inputs", "group_size"),
    [(256, 16), (1024, 32), (192, 96), (4096, 128), (512, 256), (1600, 1600), (100, 100)],
)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_gpu_keeps_the_scales_of_groups_of_every_size(inputs, group_size, bits):
    for num_rows in ROWS:
        assert_grouped(GroupedShape(200, inputs, bits, group_size), num_rows, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", ROWS)
def test_a_gpu_activates_gates(num_rows):
    shape = GroupedShape(2 * 1536, 4096, 4, 128)
    assert_grouped(shape, num_rows, torch.device("cuda"), activation="silu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize(
    ("inputs", "group_size"), [(4096, 4096), (4096, 128), (640, 640), (200, 200)]
)
def test_a_gpu_multiplies_by_numbers_of_8_bits(dtype, rounding, inputs, group_size):
    for num_rows in ROWS:
        # torch multiplies groups of whole blocks of outputs.
        for outputs in (272, 384):
            shape = ScaledShape(outputs, inputs, dtype, group_size)
            assert_scaled(shape, num_rows, rounding, torch.device("cuda"))
