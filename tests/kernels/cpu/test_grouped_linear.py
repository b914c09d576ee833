from __future__ import annotations

import pytest
import torch

from pagoda_kernels.cpu.grouped_linear import PanelGroupedLinear, has_grouped_panels
from pagoda_kernels.cpu.packed_linear import GATES
from pagoda_kernels.gated_activation import gated_activation
from pagoda_kernels.grouped_linear import Grouped, GroupedShape, make_grouped_linear
from pagoda_kernels.grouped_linear.reference import dequantize
from pagoda_kernels.quantized_linear import ReferenceLinear

BF16 = torch.bfloat16
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not has_grouped_panels(GroupedShape(32, 32, 4, 32), BF16),
    reason="this processor does not multiply whole numbers itself",
)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def make_rows(shape, *, has_zeros=False):
    """A random matrix; its numbers have a mean of nearly zero, its scales the digits of fp16."""
    size = shape.outputs, shape.inputs // shape.group_size
    middle, number = 2 ** (shape.bits - 1), 2**shape.bits
    return Grouped(
        torch.randint(0, number, (shape.outputs, shape.inputs), dtype=torch.uint8),
        (torch.rand(size) * 0.01 + 0.001).half().float(),
        (torch.randint(-1, 2, size) + middle).float() if has_zeros else None,
    )


def pack(shape, rows, bias=None, activation=None, cuts=()):
    linear = PanelGroupedLinear(shape, activation, is_symmetric=rows.zeros is None)
    for first, last in zip((0, *cuts), (*cuts, shape.outputs), strict=True):
        linear.fill(first, Grouped(*(t if t is None else t[first:last] for t in rows)))
    linear.finish(bias)
    return linear


def make_rounded(num_rows, inputs, group_size):
    """Rows that lose nothing when each group, or 128 of its inputs, is rounded to 8 bits."""
    x = torch.randint(-127, 128, (num_rows, inputs)).float()
    num_parts = -(-group_size // 128)
    for group in range(0, inputs, group_size):
        for part in range(num_parts):
            x[:, group + part * (group_size // num_parts)] = 127
    return x.to(BF16)


def assert_rounded_once(result, exact):
    assert result.dtype is BF16
    torch.testing.assert_close(result.double(), exact, rtol=2.0**-8, atol=2e-3)


def multiply_exactly(x, rows, shape, bias=None):
    exact = x.double() @ dequantize(rows, shape).double().T
    return exact if bias is None else exact + bias.double()


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(
    ("group_size", "inputs"),
    [
        (32, 96),
        (64, 64),
        (64, 256),
        (128, 384),
        (256, 512),
        (384, 384),
        (36, 72),
        (6, 66),
        (50, 50),
    ],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_products_are_exact_but_for_the_rounding_of_x_and_of_the_result(
    bits, group_size, inputs, has_zeros
):
    shape = GroupedShape(70, inputs, bits, group_size)
    rows, bias = make_rows(shape, has_zeros=has_zeros), torch.randn(70)
    linear = pack(shape, rows, bias)
    for num_rows in (1, 2, 3, 5, 8, 9, 23):
        x = make_rounded(num_rows, inputs, group_size)
        assert_rounded_once(linear(x), multiply_exactly(x, rows, shape, bias))


@pytest.mark.parametrize("outputs", [1, 16, 31, 32, 33, 100])
def test_any_number_of_outputs_comes_in_any_pieces(outputs):
    shape = GroupedShape(outputs, 64, 4, 32)
    rows, x = make_rows(shape, has_zeros=True), make_rounded(5, 64, 32)
    whole = pack(shape, rows)(x)
    assert_rounded_once(whole, multiply_exactly(x, rows, shape))
    cuts = sorted({1, outputs // 2, outputs - 1} - {0, outputs})
    assert torch.equal(pack(shape, rows, cuts=cuts)(x), whole)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_come_again_take_the_place_of_the_first(bits):
    shape = GroupedShape(64, 64, bits, 32)
    first, rows, x = make_rows(shape), make_rows(shape), make_rounded(2, 64, 32)
    linear = pack(shape, first)
    linear.fill(0, rows)
    assert torch.equal(linear(x), pack(shape, rows)(x))


@pytest.mark.parametrize("group_size", [32, 64, 128, 2048])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_normally_distributed_rows_costs_less_than_a_percent(bits, group_size):
    shape = GroupedShape(256, 2048, bits, group_size)
    integers = (torch.randn(256, 2048) * 2 ** (bits - 3)).round() + 2 ** (bits - 1)
    integers = integers.clamp(0, 2**bits - 1).to(torch.uint8)
    rows = Grouped(integers, torch.rand(256, 2048 // group_size) + 0.5, None)
    x = torch.randn(8, 2048).to(BF16)
    exact = multiply_exactly(x, rows, shape)
    error = torch.norm(pack(shape, rows)(x).double() - exact) / torch.norm(exact)
    assert error < 0.01


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_has_the_same_bits_whatever_its_neighbours(bits, has_zeros):
    shape = GroupedShape(160, 640, bits, 64)
    linear, x = pack(shape, make_rows(shape, has_zeros=has_zeros)), torch.randn(90, 640).to(BF16)
    together = linear(x)
    for first, last in ((0, 1), (3, 10), (8, 45), (3, 90), (20, 22), (30, 34)):
        assert torch.equal(linear(x[first:last]), together[first:last])


def test_the_bits_do_not_depend_on_the_number_of_threads():
    shape = GroupedShape(2048, 640, 4, 32)
    linear, x = pack(shape, make_rows(shape)), torch.randn(24, 640).to(BF16)
    expected = linear(x)
    num_threads = torch.get_num_threads()
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            assert torch.equal(linear(x), expected)
            assert torch.equal(linear(x[:2]), expected[:2])
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("size", [16, 40, 64])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("activation", GATES)
def test_a_gate_activates_and_multiplies_before_it_rounds(activation, has_zeros, size):
    shape = GroupedShape(2 * size, 128, 4, 64)
    rows, bias = make_rows(shape, has_zeros=has_zeros), torch.randn(2 * size)
    x = make_rounded(9, 128, 64)
    x[0] *= 4
    stacked = multiply_exactly(x, rows, shape, bias).float()
    result = pack(shape, rows, bias, activation, cuts=(size // 2, size + 3))(x)
    expected = gated_activation(stacked, activation)
    torch.testing.assert_close(result.float(), expected, rtol=2.0**-7, atol=1e-2)


@pytest.mark.parametrize("group_size", [32, 128])
def test_scales_of_any_size_and_sign_keep_their_digits(group_size):
    shape = GroupedShape(64, 128, 4, group_size)
    rows = make_rows(shape, has_zeros=True)
    exponents = torch.arange(64)[:, None] - 40
    factors = torch.tensor([-1.0, 1.0]).repeat(32)[:, None] * 2.0**exponents
    scales = (rows.scales * factors).contiguous()
    scales[7], scales[8] = 0, torch.finfo(torch.float32).tiny
    rows = rows._replace(scales=scales)
    x, bias = make_rounded(3, 128, group_size), torch.zeros(64)
    bias[7] = bias[8] = 300
    exact = multiply_exactly(x, rows, shape, bias)
    result = pack(shape, rows, bias)(x)
    # Sums of numbers of both signs may be small beside those.
    torch.testing.assert_close(
        result.double() / factors.T, exact / factors.T, rtol=2.0**-8, atol=2e-3
    )
    assert torch.all(result[:, 7:9] == 300)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_in_its_row(number):
    shape = GroupedShape(96, 128, 4, 32)
    linear, x = pack(shape, make_rows(shape)), torch.randn(3, 128).to(BF16)
    expected = linear(x)
    x[1, 7] = number
    result = linear(x)
    assert not torch.any(result[1].isfinite())
    assert torch.equal(result[[0, 2]], expected[[0, 2]])


def test_rows_of_zeros_give_the_bias():
    shape, bias = GroupedShape(64, 64, 8, 32), torch.randn(64).to(BF16)
    linear = pack(shape, make_rows(shape), bias)
    assert torch.equal(linear(torch.zeros(2, 64, dtype=BF16)), bias.expand(2, 64))


def test_rows_need_not_lie_next_to_each_other():
    shape = GroupedShape(64, 64, 4, 32)
    linear, x = pack(shape, make_rows(shape)), torch.randn(6, 128).to(BF16)
    assert torch.equal(linear(x[:, :64]), linear(x[:, :64].contiguous()))


def test_no_rows_give_no_rows():
    shape = GroupedShape(64, 64, 4, 32)
    assert pack(shape, make_rows(shape))(torch.zeros(0, 64, dtype=BF16)).shape == (0, 64)


def test_rows_that_do_not_fit_are_refused():
    shape = GroupedShape(64, 64, 4, 32)
    linear = pack(shape, make_rows(shape))
    for x in (torch.zeros(2, 10, dtype=BF16), torch.zeros(2, 64)):
        with pytest.raises(ValueError, match="the matrix has 64 columns"):
            linear(x)


@pytest.mark.parametrize("has_zeros", [False, True])
def test_a_matrix_in_groups_of_128_takes_little_more_than_its_bits(has_zeros):
    shape = GroupedShape(256, 2048, 4, 128)
    bits = 4 + (16 + 16 * has_zeros) / 128
    num_bytes = pack(shape, make_rows(shape, has_zeros=has_zeros)).num_bytes
    assert num_bytes <= 256 * 2048 * bits / 8 * 1.01


def test_the_device_and_the_dtype_choose_the_product():
    shape = GroupedShape(64, 64, 4, 32)
    for dtype, kind in ((BF16, PanelGroupedLinear), (torch.float32, ReferenceLinear)):
        linear = make_grouped_linear(shape, dtype=dtype, device=CPU, is_symmetric=True)
        assert type(linear) is kind
        rows, x = make_rows(shape), make_rounded(3, 64, 32).to(dtype)
        linear.fill(0, rows)
        linear.finish(None)
        exact = multiply_exactly(x, rows, shape)
        torch.testing.assert_close(linear(x).double(), exact, rtol=2.0**-8, atol=2e-3)
