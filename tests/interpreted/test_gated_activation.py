from __future__ import annotations

import pytest
import torch

from pagoda_kernels.gated_activation import ACTIVATIONS, gated_activation
from pagoda_kernels.testing import watch_moves


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1, 63, 100, 640, 4096])
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2e-6), (torch.float16, 2**-10)])
def test_a_gate_equals_its_specification(activation, size, dtype, eps):
    torch.manual_seed(0)
    gate_up = (torch.randn(3, 2 * size) * 5).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    result = gated_activation(gate_up, activation)
    assert result.dtype is dtype
    expected = ACTIVATIONS[activation](gate) * up
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=eps)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_numbers_pass_or_vanish(activation):
    gate_up = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1.0, 1.0, 1.0, 1.0]])
    result = gated_activation(gate_up, activation)
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.0, 0.0, 200.0]]))


def test_numbers_are_moved_once():
    gate_up = torch.randn(3, 200).half()
    with watch_moves() as moves:
        result = gated_activation(gate_up, "silu")
    assert torch.all(moves.loads(gate_up) == 1)
    assert torch.all(moves.stores(result) == 1)


def test_rows_that_do_not_follow_each_other_are_refused():
    with pytest.raises(ValueError, match="contiguous"):
        gated_activation(torch.zeros(4, 6).T, "silu")
