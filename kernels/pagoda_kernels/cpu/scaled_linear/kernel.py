"""The loops of `pagoda_kernels.cpu.scaled_linear`: see `pagoda_kernels.cpu.threads`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pagoda_kernels.cpu.compiled import address_of
from pagoda_kernels.cpu.formats import floats
from pagoda_kernels.cpu.packed_linear.kernel import NO_GATE, finish_rows
from pagoda_kernels.cpu.panels import (
    BF16,
    E4M3,
    GROUP_SIZE,
    MOST_ROWS,
    PANEL_SIZE,
    STEP_BYTES,
    VECTOR_BYTES,
    add_scaled_group,
    empty_panels,
    make_dot,
    widen_step,
)
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, claim, make_reader

_dot, _dot_wide = make_dot(E4M3), make_dot(BF16)


class _Arguments(NamedTuple):
    panels: int
    num_pairs: int
    inputs: int
    block_size: int
    """Inputs that share scales; the last block may have fewer."""
    scales: int
    """[num_pairs, num_blocks, GROUP_SIZE] fp32."""
    bias: int
    """[num_pairs, GROUP_SIZE] fp32."""
    gate: int
    outputs: int
    x: int
    num_rows: int
    out: int


_arguments = make_reader(_Arguments)


def _multiply(task: Task) -> None:
    """A part is a pair of panels."""
    a = _arguments(task)
    num_columns = GROUP_SIZE if a.gate == NO_GATE else PANEL_SIZE
    num_blocks = (a.inputs + a.block_size - 1) // a.block_size
    num_passes = (a.num_rows + MOST_ROWS - 1) // MOST_ROWS
    row_bytes, pair_bytes = 2 * a.inputs, GROUP_SIZE * a.inputs
    ahead_stride = VECTOR_BYTES // num_passes
    sums = np.zeros((MOST_ROWS, GROUP_SIZE), np.float32)
    total, zeros = np.zeros_like(sums), np.zeros(GROUP_SIZE, np.float32)
    # In one pass, numbers are widened on the way; for several, before them.
    is_widened = num_passes > 1
    wide = empty_panels(GROUP_SIZE * a.inputs if is_widened else 0)
    pair = claim(task)
    while pair < a.num_pairs:
        following = claim(task)
        panels = a.panels + pair * pair_bytes
        if is_widened:
            for i in range(0, pair_bytes, VECTOR_BYTES):
                widen_step(panels + i, address_of(wide) + 2 * i)
        # Each pass asks for its part of the panels that this thread has next.
        ahead = a.panels + min(following, a.num_pairs - 1) * pair_bytes
        first = pair * num_columns
        count = min(num_columns, a.outputs - first)
        row = 0
        while row < a.num_rows:
            rows = min(MOST_ROWS, a.num_rows - row)
            total[:] = floats(a.bias + 4 * pair * GROUP_SIZE, (GROUP_SIZE,))
            for block in range(num_blocks):
                begin = block * a.block_size
                num_steps = min(a.block_size, a.inputs - begin) // 2
                scales = a.scales + 4 * (pair * num_blocks + block) * GROUP_SIZE
                done = 0
                while done < rows:
                    x = a.x + (row + done) * row_bytes + 2 * begin
                    if is_widened:
                        done += _dot_wide(
                            address_of(wide) + begin // 2 * STEP_BYTES,
                            num_steps,
                            x,
                            row_bytes,
                            rows - done,
                            address_of(zeros),
                            0,
                            address_of(sums[done]),
                            ahead,
                            ahead_stride,
                        )
                    else:
                        done += _dot(
                            panels + begin // 2 * VECTOR_BYTES,
                            num_steps,
                            x,
                            row_bytes,
                            rows - done,
                            address_of(zeros),
                            0,
                            address_of(sums[done]),
                            ahead,
                            ahead_stride,
                        )
                ahead += num_steps * ahead_stride
                for i in range(rows):
                    add_scaled_group(address_of(sums[i]), scales, address_of(total[i]))
            at = a.out + 2 * (row * a.outputs + first)
            finish_rows(total[:rows], a.gate, at, a.outputs, count)
            row += rows
        pair = following


multiply = ThreadedKernel(_multiply, needs=E4M3.features)
