from __future__ import annotations

import pytest
import torch

from pagoda_kernels.cpu.packing import make_panels, pack
from pagoda_kernels.cpu.panels import BF16, GROUP_SIZE, INT8


def packed(matrix, numbers):
    panels = make_panels(-(-len(matrix) // GROUP_SIZE), matrix.shape[1], numbers)
    pack(matrix, panels)
    return panels


@pytest.mark.parametrize("num_rows", [1, 32, 40, 95])
@pytest.mark.parametrize("num_steps", [1, 15, 16, 37])
@pytest.mark.parametrize("numbers", [BF16, INT8], ids=["bf16", "int8"])
def test_panels_hold_the_numbers_of_a_step_of_each_row_next_to_each_other(
    numbers, num_steps, num_rows
):
    torch.manual_seed(0)
    per_step = 4 // numbers.multiplied_bytes
    matrix = torch.randint(-100, 100, (num_rows, num_steps * per_step))
    matrix = matrix.to(torch.bfloat16 if numbers is BF16 else torch.int8)
    panels = packed(matrix, numbers)
    missing = -num_rows % GROUP_SIZE
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, missing))
    expected = padded.view(-1, GROUP_SIZE, num_steps, per_step).transpose(1, 2)
    assert panels.dtype is matrix.dtype
    assert torch.equal(panels, expected)


def test_rows_need_not_lie_next_to_each_other():
    matrix = torch.randn(64, 64).bfloat16()
    assert torch.equal(packed(matrix[:, :32], BF16), packed(matrix[:, :32].contiguous(), BF16))


def test_part_of_a_step_is_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        make_panels(1, 6, INT8)
