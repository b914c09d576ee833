from __future__ import annotations

import pytest
import torch

from pagoda_kernels.cpu.int8_argmax import Int8Argmax, has_int8_argmax
from pagoda_kernels.cpu.panels import INT8, has_panels

pytestmark = pytest.mark.skipif(
    not has_panels(INT8), reason="this processor has no product of bytes"
)


def make_int8_argmax(table):
    return Int8Argmax(table, lambda hidden: hidden @ table.T)


def expected_argmax(table, hidden):
    return (hidden.double() @ table.double().T).argmax(-1)


@pytest.mark.parametrize("vocab_size", [4096, 700, 33])
@pytest.mark.parametrize("rows", [1, 4, 17])
def test_the_result_is_the_argmax_of_exact_logits(rows, vocab_size):
    torch.manual_seed(0)
    table = (torch.randn(vocab_size, 96) * torch.rand(vocab_size, 1)).bfloat16()
    hidden = (torch.randn(rows, 96) * 7).bfloat16()
    assert torch.equal(make_int8_argmax(table)(hidden), expected_argmax(table, hidden))


def test_close_logits_are_told_apart_and_the_first_of_equals_wins():
    torch.manual_seed(0)
    table = torch.randn(2048, 64).bfloat16()
    hidden = torch.randn(3, 64).bfloat16()
    for row, token_ids in enumerate([(5, 900), (1500, 1501), (7, 2047)]):
        table[list(token_ids)] = (hidden[row] * 2).bfloat16()
    # One weight of one bit more than in its twin.
    position = int(hidden[1].abs().argmin())
    table[1501, position] += torch.sign(hidden[1, position]) * 2.0**-4
    assert make_int8_argmax(table)(hidden).tolist() == [5, 1501, 7]


def test_a_row_of_which_int8_says_nothing_is_decided_by_all_logits():
    """One huge number leaves none of the others in int8, and here it weighs nothing."""
    torch.manual_seed(0)
    table = torch.randn(8192, 64).bfloat16()
    table[:, 3] = 0.0
    hidden = torch.randn(5, 64).bfloat16()
    table[8000] = (hidden[2] * 2).bfloat16()
    hidden[2, 3] = 1e4
    table[8000, 3] = 0.0
    hidden[4] = 0.0
    assert torch.equal(make_int8_argmax(table)(hidden), expected_argmax(table, hidden))


def test_large_numbers_among_small_ones_leave_int8_enough_to_say():
    """As in the hidden states of trained models; without the rotation all rows would be hard."""
    torch.manual_seed(0)
    table = torch.randn(8192, 128).bfloat16()
    hidden = torch.randn(4, 128).bfloat16()
    hidden[:, 3] = 100.0
    table[:, 3] *= 0.01
    int8_argmax = make_int8_argmax(table)
    int8_argmax.product = None
    assert torch.equal(int8_argmax(hidden), expected_argmax(table, hidden))


def test_a_row_that_is_not_a_number_leaves_its_neighbours_alone():
    torch.manual_seed(0)
    table = torch.randn(2048, 64).bfloat16()
    hidden = torch.randn(3, 64).bfloat16()
    hidden[1, 5] = torch.nan
    # Two equal tokens: as many candidates in all as there are rows.
    table[[5, 900]] = (hidden[0] * 2).bfloat16()
    tokens = make_int8_argmax(table)(hidden)
    assert tokens[0] == 5
    assert tokens[2] == expected_argmax(table, hidden[2:])


def test_a_token_with_weights_of_zero_can_win():
    table = -torch.ones(1024, 64).bfloat16()
    table[77] = 0.0
    assert make_int8_argmax(table)(torch.ones(1, 64).bfloat16()).tolist() == [77]


def test_all_logits_of_a_row_may_be_negative():
    """What fills the last group of a vocabulary must not win."""
    table = -torch.ones(700, 64).bfloat16()
    table[123] = -0.5
    assert make_int8_argmax(table)(torch.ones(3, 64).bfloat16()).tolist() == [123] * 3


def test_a_vector_must_be_made_of_whole_steps():
    assert has_int8_argmax(torch.empty(32001, 8).bfloat16())
    assert not has_int8_argmax(torch.empty(32000, 6))
