from __future__ import annotations

import pytest
import torch

from pagoda_kernels.cpu.int8_argmax import (
    ROW_OFFSET,
    Int8Table,
    Quantized,
    choose_tokens,
    quantize,
)
from pagoda_kernels.cpu.int8_argmax.kernel import CHUNK_GROUPS
from pagoda_kernels.cpu.panels import GROUP_SIZE, INT8, has_panels

CHUNK = CHUNK_GROUPS * GROUP_SIZE

needs_panels = pytest.mark.skipif(
    not has_panels(INT8), reason="this processor has no product of bytes"
)


def rotate(x: torch.Tensor, rotation_size: int) -> torch.Tensor:
    """[num_rows, size]: x, each rotation_size numbers multiplied by Hadamard's matrix."""
    matrix = torch.ones(1, 1)
    while len(matrix) < rotation_size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return (x.float().view(len(x), -1, rotation_size) @ matrix).flatten(1)


def quantize_reference(matrix: torch.Tensor, rotation_size: int, offset: int = 0) -> Quantized:
    # The rotation makes numbers larger by the square root of its size.
    numbers = rotate(matrix, rotation_size) * rotation_size**-0.5
    scales = numbers.abs().amax(-1).clamp(min=1e-30) / 127
    numbers /= scales[:, None]
    whole = numbers.round()
    squares = torch.stack([(numbers - whole).square().sum(-1), whole.square().sum(-1)], -1)
    dtype = torch.uint8 if offset else torch.int8
    return Quantized((whole + offset).to(dtype), scales, whole.sum(-1).int(), squares)


def largest_of_columns(logits: torch.Tensor) -> torch.Tensor:
    """[num_rows, num_chunks, GROUP_SIZE] fp32: of [num_rows, vocab_size] logits."""
    missing = -logits.shape[1] % (CHUNK_GROUPS * GROUP_SIZE)
    padded = torch.nn.functional.pad(logits.float(), (0, missing), value=-torch.inf)
    return padded.view(len(logits), -1, CHUNK_GROUPS, GROUP_SIZE).amax(2)


def choose_tokens_reference(
    hidden: torch.Tensor,
    table: torch.Tensor,
    largest: torch.Tensor,
    errors: torch.Tensor,
    most_candidates: int,
) -> torch.Tensor:
    best = largest.flatten(1).amax(1)
    may_be = largest >= (best - 2 * errors)[:, None, None]
    candidates = may_be[:, :, None].expand(-1, -1, CHUNK_GROUPS, -1).flatten(1)[:, : len(table)]
    exact = (hidden.float() @ table.float().T).masked_fill(~candidates, -torch.inf)
    counts = candidates.sum(1)
    tokens = exact.argmax(1)
    # Not a number: there is no largest.
    tokens[counts == 0] = len(table) - 1
    tokens[counts > most_candidates] = -1
    return tokens


def int8_table(integers, scales):
    sums = integers.sum(1, dtype=torch.int32)
    return Int8Table(Quantized(integers, scales, sums, torch.empty(len(integers), 2)))


def choose(hidden, table, logits, errors, most=CHUNK):
    return choose_tokens(hidden, table, largest_of_columns(logits), errors, most)


@pytest.mark.parametrize("vocab_size", [64, 512, 700])
@pytest.mark.parametrize("offset", [0.0, 5.0, -50.0])
@pytest.mark.parametrize("error", [0.0, 0.3])
def test_the_exact_logits_decide_among_those_that_may_be_the_largest(offset, error, vocab_size):
    """Logits that are off, of all signs: -50 leaves none that is positive."""
    torch.manual_seed(0)
    table, hidden = torch.randn(vocab_size, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    table[:, 0] = 1.0
    hidden[:, 0] += offset
    exact = hidden.double() @ table.double().T
    off = (torch.rand(exact.shape) * 2 - 1) * error
    tokens = choose(hidden, table, exact + off, torch.full((40,), error), most=vocab_size)
    assert torch.equal(tokens, exact.argmax(-1))


def test_the_first_of_equals_wins_whatever_column_it_is_in():
    table, hidden = torch.zeros(1300, 8).bfloat16(), torch.ones(3, 8).bfloat16()
    for tokens in ([40, 5], [600, 37], [1299, 1]):
        table.zero_()
        table[tokens] = 1.0
        logits = hidden.float() @ table.float().T
        assert choose(hidden, table, logits, torch.zeros(3)).tolist() == [min(tokens)] * 3


def test_rows_with_too_many_candidates_are_left_to_others():
    table, hidden = torch.ones(CHUNK, 8).bfloat16(), torch.ones(2, 8).bfloat16()
    logits = torch.zeros(2, CHUNK)
    logits[0, 5] = 2.0
    logits[1, :2] = 2.0
    errors = torch.full((2,), 0.1)
    assert choose(hidden, table, logits, errors, most=CHUNK_GROUPS).tolist() == [5, -1]


@needs_panels
@pytest.mark.parametrize("vocab_size", [32, 700, 1100])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 21])
def test_the_largest_logits_are_those_of_the_whole_numbers(rows, vocab_size):
    torch.manual_seed(0)
    integers = torch.randint(-127, 128, (vocab_size, 24), dtype=torch.int8)
    scales = torch.rand(vocab_size) + 0.1
    x = torch.randint(1, 256, (rows, 24), dtype=torch.uint8)
    logits = (x.double() - 128) @ integers.double().T * scales.double()
    expected = largest_of_columns(logits)
    largest = int8_table(integers, scales).find_largest(x)
    is_padding = expected == -torch.inf
    assert torch.all(largest[is_padding] < logits.min() * 10)
    torch.testing.assert_close(largest[~is_padding], expected[~is_padding])


def test_quantized_rows_give_rotated_products_within_their_deviation():
    torch.manual_seed(0)
    hidden = torch.randn(30, 96).bfloat16()
    hidden[0] = 0.0
    hidden[1, 5] = 200.0
    integers, _, sums, squares = quantize(hidden, 32, ROW_OFFSET)
    rotated = rotate(hidden, 32)
    scaled = rotated * (127 / rotated.abs().amax(-1, keepdim=True).clamp(min=1e-30))
    errors = scaled - (integers.float() - 128)
    assert errors.abs().max() <= 0.501
    assert torch.equal(sums, (integers.int() - 128).sum(-1, dtype=torch.int32))
    torch.testing.assert_close(
        squares[:, 0].sqrt(), errors.square().sum(-1).sqrt(), atol=1e-2, rtol=1e-2
    )


@pytest.mark.parametrize("offset", [0, ROW_OFFSET])
@pytest.mark.parametrize("rotation_size", [1, 8, 32])
def test_rows_and_tables_are_rounded_as_the_specification_says(rotation_size, offset):
    torch.manual_seed(0)
    table = torch.randn(500, 96).bfloat16()
    ours = quantize(table, rotation_size, offset)
    theirs = quantize_reference(table, rotation_size, offset)
    # A number halfway between two may be rounded to either: sums are made in another order.
    assert ours.integers.dtype is theirs.integers.dtype
    assert (ours.integers.int() - theirs.integers.int()).abs().max() <= 1
    assert (ours.integers != theirs.integers).float().mean() < 0.01
    torch.testing.assert_close(ours.scales, theirs.scales)
    torch.testing.assert_close(ours.squares.sqrt(), theirs.squares.sqrt(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("most", [1, 40, 1000])
def test_tokens_are_chosen_as_the_specification_says(most):
    torch.manual_seed(0)
    table, hidden = torch.randn(700, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    logits = hidden.float() @ table.float().T + torch.randn(40, 700)
    logits[7] = torch.nan
    errors = torch.rand(40) * 3
    case = (hidden, table, largest_of_columns(logits), errors, most)
    assert torch.equal(choose_tokens(*case), choose_tokens_reference(*case))


def test_products_of_rotated_and_rounded_factors_are_as_exact_as_they_say():
    torch.manual_seed(0)
    table, hidden = torch.randn(500, 96).bfloat16(), torch.randn(40, 96).bfloat16()
    hidden[:, 7] *= 50
    integers, scales, sums, squares = quantize(table, 32)
    assert torch.equal(sums, integers.sum(1, dtype=torch.int32))
    error, power = (squares * scales.square()[:, None] / 96).amax(0)
    rows = quantize(hidden, 32, ROW_OFFSET)
    deviations = (rows.squares @ torch.stack([power, error])).sqrt()
    products = (rows.integers.double() - 128) @ (integers.double() * scales.double()[:, None]).T
    exact = hidden.double() @ table.double().T
    units = (products * exact).sum(-1) / exact.square().sum(-1)
    off = (products - exact * units[:, None]) / deviations[:, None]
    # Below 1, because the deviation is that of the largest weights.
    assert 0.5 < off.square().mean().sqrt() < 1.1
    assert off.abs().max() < 6


def test_tensors_that_do_not_fit_are_refused():
    hidden, table = torch.zeros(2, 8).bfloat16(), torch.zeros(64, 8).bfloat16()
    with pytest.raises(ValueError, match="rotation_size"):
        quantize(hidden, 16)
    with pytest.raises(ValueError, match="bf16"):
        quantize(hidden.float(), 8)
    with pytest.raises(ValueError, match="largest"):
        choose(hidden, table, torch.zeros(2, 1024), torch.zeros(2))
    with pytest.raises(ValueError, match="errors"):
        choose(hidden, table, torch.zeros(2, 64), torch.zeros(3))


@needs_panels
def test_rows_that_do_not_fit_the_table_are_refused():
    table = int8_table(torch.zeros(32, 8, dtype=torch.int8), torch.ones(32))
    for rows in (torch.zeros(2, 12, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.int8)):
        with pytest.raises(ValueError, match="rows"):
            table.find_largest(rows)
    with pytest.raises(ValueError, match="multiple of 4"):
        int8_table(torch.zeros(32, 6, dtype=torch.int8), torch.ones(32))
