from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, silu

from pagoda_kernels.cpu.packed_linear import GATES, PackedLinear, can_pack
from pagoda_kernels.cpu.panels import BF16, has_panels

pytestmark = pytest.mark.skipif(not has_panels(BF16), reason="this processor has no panels of bf16")


def make(*size, scale=1.0):
    return (torch.randn(*size) * scale).bfloat16()


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def assert_rounded_once(result, exact, slack=2.0**-8):
    """Within a rounding to bf16 of the exact numbers, and a little for fp32 sums."""
    assert result.dtype is torch.bfloat16
    torch.testing.assert_close(result.double(), exact, rtol=slack, atol=1e-4)


@pytest.mark.parametrize("out_features", [1, 16, 31, 32, 100])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 15, 40])
def test_a_product_is_exact_but_for_one_rounding(rows, out_features):
    matrix, bias, x = make(out_features, 66), make(out_features), make(rows, 66)
    exact = x.double() @ matrix.double().T + bias.double()
    assert_rounded_once(PackedLinear(matrix, bias)(x), exact)


def test_a_row_has_the_same_bits_whatever_its_neighbours():
    product, x = PackedLinear(make(160, 640)), make(45, 640)
    together = product(x)
    for first, last in ((0, 1), (3, 10), (8, 45), (20, 22)):
        assert torch.equal(product(x[first:last]), together[first:last])


def test_the_bits_do_not_depend_on_the_number_of_threads():
    product, x = PackedLinear(make(2048, 640)), make(16, 640)
    expected = product(x)
    num_threads = torch.get_num_threads()
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            assert torch.equal(product(x), expected)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("size", [16, 40, 64])
@pytest.mark.parametrize("activation", GATES)
def test_a_gate_activates_and_multiplies_before_it_rounds(activation, size):
    gate, up, x = make(size, 64, scale=0.3), make(size, 64), make(9, 64)
    gate_bias = make(size)
    x[0] *= 40
    function = {
        "silu": silu,
        "gelu": gelu,
        "gelu_pytorch_tanh": lambda number: gelu(number, approximate="tanh"),
    }[activation]
    exact = function(x.double() @ gate.double().T + gate_bias.double()) * (
        x.double() @ up.double().T
    )
    result = PackedLinear(
        torch.cat([gate, up]), torch.cat([gate_bias, torch.zeros(size)]), activation
    )(x)
    assert_rounded_once(result, exact, slack=2.0**-7)


@pytest.mark.parametrize("activation", GATES)
def test_a_gate_keeps_what_is_not_a_number_in_its_row(activation):
    gate = PackedLinear(make(128, 64), None, activation)
    x = make(3, 64)
    expected = gate(x)
    x[1, 7] = torch.nan
    result = gate(x)
    assert torch.all(result[1].isnan())
    assert torch.equal(result[[0, 2]], expected[[0, 2]])


def test_rows_need_not_lie_next_to_each_other():
    product, x = PackedLinear(make(64, 64)), make(6, 128)
    assert torch.equal(product(x[:, :64]), product(x[:, :64].contiguous()))


def test_no_rows_give_no_rows():
    assert PackedLinear(make(64, 64))(make(0, 64)).shape == (0, 64)


def test_a_matrix_or_rows_that_do_not_fit_are_refused():
    assert not can_pack(torch.zeros(32, 8))
    assert not can_pack(make(32, 7))
    with pytest.raises(ValueError, match="in_features is 7"):
        PackedLinear(make(32, 7))
    for x in (make(2, 10), torch.zeros(2, 8)):
        with pytest.raises(ValueError, match="the matrix has 8 columns"):
            PackedLinear(make(32, 8))(x)
