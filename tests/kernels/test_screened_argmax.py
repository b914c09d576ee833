from __future__ import annotations

import pytest
import torch

from pagoda_kernels.screened_argmax import choose_tokens, quantize_rows, quantize_table


def choose(hidden, table, logits, errors, most=8, chunk=16):
    largest = logits.view(torch.int16).view(len(logits), -1, chunk).amax(-1)
    return choose_tokens(hidden, table, logits, largest, errors, most)


@pytest.mark.parametrize("offset", [0.0, 5.0, -5.0, -50.0])
@pytest.mark.parametrize("error", [0.0, 0.3])
def test_the_exact_logits_decide_among_those_that_may_be_the_largest(offset, error):
    """Logits that are off, of all signs: -50 leaves none that is positive."""
    torch.manual_seed(0)
    table, hidden = torch.randn(64, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    table[:, 0] = 1.0
    hidden[:, 0] += offset
    exact = hidden.double() @ table.double().T
    off = (torch.rand(exact.shape) * 2 - 1) * error
    tokens = choose(hidden, table, (exact + off).bfloat16(), torch.full((40,), error), most=64)
    assert torch.equal(tokens, exact.argmax(-1))


def test_the_first_of_equals_wins_and_zeros_are_numbers_too():
    table, hidden = torch.ones(64, 8).bfloat16(), torch.zeros(2, 8).bfloat16()
    logits = torch.zeros(2, 64).bfloat16()
    logits[1, :32] = -0.0
    assert choose(hidden, table, logits, torch.zeros(2), most=64).tolist() == [0, 0]


def test_rows_with_too_many_candidates_are_left_to_others():
    table, hidden = torch.ones(64, 8).bfloat16(), torch.ones(2, 8).bfloat16()
    logits = torch.zeros(2, 64).bfloat16()
    logits[0, 5] = 2.0
    logits[1, :9] = 2.0
    assert choose(hidden, table, logits, torch.full((2,), 0.1), most=8).tolist() == [5, -1]


def test_quantized_rows_give_rotated_products_within_their_deviation():
    torch.manual_seed(0)
    hidden = torch.randn(30, 96).bfloat16()
    hidden[0] = 0.0
    hidden[1, 5] = 200.0
    integers, deviations = quantize_rows(hidden, 32, 0.0, 1.0)
    matrix = torch.tensor([[1.0]])
    while len(matrix) < 32:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    rotated = (hidden.float().view(-1, 32) @ matrix).view(30, 96)
    scaled = rotated * (127 / rotated.abs().amax(-1, keepdim=True).clamp(min=1e-30))
    errors = scaled - (integers.float() - 128)
    assert errors.abs().max() <= 0.501
    torch.testing.assert_close(deviations, errors.square().sum(-1).sqrt(), atol=1e-2, rtol=1e-2)


def test_products_of_rotated_and_rounded_factors_are_as_exact_as_they_say():
    torch.manual_seed(0)
    table, hidden = torch.randn(500, 96).bfloat16(), torch.randn(40, 96).bfloat16()
    hidden[:, 7] *= 50
    integers, scales, error, power = quantize_table(table, 32)
    rows, deviations = quantize_rows(hidden, 32, error, power)
    products = (rows.double() - 128) @ (integers.double() * scales.double()[:, None]).T
    exact = hidden.double() @ table.double().T
    units = (products * exact).sum(-1) / exact.square().sum(-1)
    off = (products - exact * units[:, None]) / deviations[:, None]
    # Below 1, because the deviation is that of the largest weights.
    assert 0.5 < off.square().mean().sqrt() < 1.1
    assert off.abs().max() < 6


def test_tensors_that_do_not_fit_are_refused():
    hidden, table = torch.zeros(2, 8).bfloat16(), torch.zeros(64, 8).bfloat16()
    with pytest.raises(ValueError, match="rotation_size"):
        quantize_rows(hidden, 16, 0.0, 0.0)
    with pytest.raises(ValueError, match="bf16"):
        quantize_rows(hidden.float(), 8, 0.0, 0.0)
    with pytest.raises(ValueError, match="logits"):
        choose(hidden, table, torch.zeros(2, 32).bfloat16(), torch.zeros(2))
    with pytest.raises(ValueError, match="errors"):
        choose(hidden, table, torch.zeros(2, 64).bfloat16(), torch.zeros(3))
