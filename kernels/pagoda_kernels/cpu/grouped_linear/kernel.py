"""The loops of `pagoda_kernels.cpu.grouped_linear`: see `pagoda_kernels.cpu.threads`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pagoda_kernels.cpu.compiled import address_of, compiled
from pagoda_kernels.cpu.formats import (
    bf16_bits,
    floats,
    int8s,
    int32s,
    quantize,
    uint8s,
    widen,
)
from pagoda_kernels.cpu.grouped_linear.dot import (
    HEAD_BYTES,
    PLANE_BYTES,
    make_dot,
    step_bytes,
)
from pagoda_kernels.cpu.packed_linear.kernel import NO_GATE, finish_rows
from pagoda_kernels.cpu.panels import (
    BYTES_PER_STEP,
    GROUP_SIZE,
    INT8,
    MOST_ROWS,
    PANEL_SIZE,
    STEP_BYTES,
    VECTOR_BYTES,
    scale_group,
)
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, claim, make_reader

FEW_ROWS = 64
"""So many rows, times the number of threads, each thread rounds for itself: that takes less than to
wait for the others."""
_PART_ROWS = 4
"""Rows that a thread rounds at a time."""
_LARGEST, _LEAST = np.float32(127), np.float32(1e-30)


class Matrix(NamedTuple):
    """A matrix in pairs of panels; addresses and numbers of bytes."""

    panels: int
    num_pairs: int
    pair_bytes: int
    bits: int
    steps_per_turn: int
    first_plane: int
    """The lowest bit that lies in a plane; below it are nibbles, if it is not 0."""
    num_blocks: int
    block_size: int
    """Inputs, zeros at the end of each group included."""
    block_bytes: int
    first_byte: int
    """Of a block's numbers."""
    scales: int
    scales_pair_bytes: int
    scales_block_bytes: int
    has_zeros: int
    """Whether as many zeros follow the scales."""
    zero: int
    """Of all groups; 0 if they have their own."""
    inputs: int
    group_size: int
    blocks_per_group: int
    bias: int
    """[num_pairs, GROUP_SIZE] fp32."""
    multipliers: int
    """[num_pairs, GROUP_SIZE] fp32, of the columns."""
    gate: int
    outputs: int


class _Arguments(NamedTuple):
    matrix: int
    x: int
    is_rounded: int
    """Whether x is the result of round_rows; else it is bf16."""
    num_rows: int
    out: int


_arguments, _matrix = make_reader(_Arguments), make_reader(Matrix)


@compiled
def _rounded_row_bytes(m: Matrix) -> int:
    return m.num_blocks * (HEAD_BYTES + m.block_size)


@compiled
def _inputs_of(m: Matrix, block: int) -> Any:
    """The first input of a block, and how many it has; what is left of it is zeros."""
    group, part = block // m.blocks_per_group, block % m.blocks_per_group
    first = group * m.group_size + part * m.block_size
    return first, min(m.block_size, (group + 1) * m.group_size - first)


@compiled
def _round(m: Matrix, x: int, first_row: int, last_row: int, out: int) -> None:
    """Rows of bf16 in whole numbers, block by block, each with its head."""
    wide = np.empty(m.inputs, np.float32)
    for row in range(first_row, last_row):
        widen(bf16_bits(x + 2 * row * m.inputs, (m.inputs,)), wide)
        at = out + row * _rounded_row_bytes(m)
        for block in range(m.num_blocks):
            first, size = _inputs_of(m, block)
            integers = int8s(at + HEAD_BYTES, (m.block_size,))
            scale = quantize(wide[first : first + size], integers[:size], _LARGEST, _LEAST)
            integers[size:] = 0
            total = np.int32(0)
            for i in range(size):
                total += np.int32(integers[i])
            floats(at, (1,))[0] = scale
            int32s(at + 4, (1,))[0] = -total * np.int32(m.zero)
            floats(at + 8, (1,))[0] = -np.float32(total)
            at += HEAD_BYTES + m.block_size


def _round_rows(task: Task) -> None:
    """out: [num_rows, num_blocks, HEAD_BYTES + block_size] uint8. A part is _PART_ROWS rows."""
    a = _arguments(task)
    m = _matrix(a.matrix)
    first = claim(task) * _PART_ROWS
    while first < a.num_rows:
        _round(m, a.x, first, min(first + _PART_ROWS, a.num_rows), a.out)
        first = claim(task) * _PART_ROWS


round_rows = ThreadedKernel(_round_rows, needs=INT8.features)


def _make_multiply(bits: int) -> ThreadedKernel:
    """The product with a matrix whose panels have so many bits for each number."""
    dot, bytes_per_step = make_dot(bits), step_bytes(bits)
    # Few rows wait for memory, and the processor foresees a single stream best alone.
    foreseen_rows = bits // 2

    def multiply(task: Task) -> None:
        """A part is a pair of panels."""
        a = _arguments(task)
        m = _matrix(a.matrix)
        num_rows, num_columns = a.num_rows, GROUP_SIZE if m.gate == NO_GATE else PANEL_SIZE
        num_steps, row_bytes = m.block_size // BYTES_PER_STEP, _rounded_row_bytes(m)
        own_rows = np.empty(0 if a.is_rounded else num_rows * row_bytes, np.uint8)
        if not a.is_rounded:
            _round(m, a.x, 0, num_rows, address_of(own_rows))
        sums = np.zeros((MOST_ROWS, GROUP_SIZE), np.float32)
        num_passes = (num_rows + MOST_ROWS - 1) // MOST_ROWS
        is_ahead = num_rows > foreseen_rows
        ahead_block = m.block_bytes // num_passes if is_ahead else 0
        ahead_first = m.first_byte // num_passes if is_ahead else 0
        ahead_step = bytes_per_step // num_passes if is_ahead else 0
        pair = claim(task)
        while pair < m.num_pairs:
            following = claim(task)
            columns, first = pair * GROUP_SIZE * 4, pair * num_columns
            count = min(num_columns, m.outputs - first)
            # Named here, because memory is kept until it is named last.
            x = a.x if a.is_rounded else address_of(own_rows)
            # Each pass asks for its part of the panels that this thread has next.
            ahead = m.panels + min(following, m.num_pairs - 1) * m.pair_bytes
            if not is_ahead:
                ahead = address_of(sums)
            row = 0
            while row < num_rows:
                rows = dot(
                    m.panels + pair * m.pair_bytes + m.first_byte,
                    m.block_bytes,
                    m.num_blocks,
                    num_steps,
                    m.scales + pair * m.scales_pair_bytes,
                    m.scales_block_bytes,
                    m.has_zeros,
                    x + row * row_bytes,
                    row_bytes,
                    num_rows - row,
                    address_of(sums),
                    ahead,
                    ahead_block,
                    ahead_first,
                    ahead_step,
                )
                ahead += ahead_block * m.num_blocks
                for i in range(rows):
                    scale_group(address_of(sums[i]), m.multipliers + columns, m.bias + columns)
                at = a.out + 2 * (row * m.outputs + first)
                finish_rows(sums[:rows], m.gate, at, m.outputs, count)
                row += rows
            pair = following

    return ThreadedKernel(multiply, needs=INT8.features, variant=str(bits))


WIDTHS = (2, 3, 4, 5, 6, 8)
MULTIPLY = {bits: _make_multiply(bits) for bits in WIDTHS}
"""By the bits of a number."""


class _Filling(NamedTuple):
    matrix: int
    integers: int
    """[num_rows, inputs] uint8."""
    first_row: int
    """Of the matrix, which with a gate has twice as many rows as outputs."""
    num_rows: int


_filling = make_reader(_Filling)


@compiled
def _write_column(m: Matrix, numbers: Any, block: int, column: int) -> None:
    """The numbers of a block's steps, 4 bytes of each, of one column of a pair of panels."""
    panel, lane = column // PANEL_SIZE, column % PANEL_SIZE
    turn_bytes = m.steps_per_turn * STEP_BYTES * m.bits // 8
    for step in range(len(numbers)):
        number, inside = numbers[step], step % m.steps_per_turn
        turn = block + step // m.steps_per_turn * turn_bytes
        if m.bits == 8:
            at = turn + inside * STEP_BYTES + panel * VECTOR_BYTES + lane * BYTES_PER_STEP
            int32s(at, (1,))[0] = number
            continue
        if m.first_plane:
            word = int32s(turn + inside * VECTOR_BYTES + lane * BYTES_PER_STEP, (1,))
            nibbles = np.int32(0x0F0F0F0F)
            shift = np.int32(4 * panel)
            word[0] = (word[0] & ~(nibbles << shift)) | ((number & nibbles) << shift)
            turn += m.steps_per_turn * VECTOR_BYTES
        for bit in range(m.first_plane, m.bits):
            ones = (number >> np.int32(bit)) & np.int32(0x01010101)
            four = (ones | (ones >> 7) | (ones >> 14) | (ones >> 21)) & 15
            plane = turn + ((bit - m.first_plane) * m.steps_per_turn + inside) * PLANE_BYTES
            # A byte has the bits of two columns.
            byte = uint8s(plane + panel * (PLANE_BYTES // 2) + lane // 2, (1,))
            place = 4 * (lane % 2)
            byte[0] = (byte[0] & ~(15 << place)) | (four << place)


def _fill(task: Task) -> None:
    """A part is a pair of panels."""
    a = _filling(task)
    m = _matrix(a.matrix)
    row = np.zeros(m.block_size, np.uint8)
    numbers = int32s(address_of(row), (m.block_size // BYTES_PER_STEP,))
    pair = claim(task)
    while pair < m.num_pairs:
        for column in range(GROUP_SIZE):
            index = pair * GROUP_SIZE + column
            is_whole = index < m.outputs
            if m.gate != NO_GATE:
                index = pair * PANEL_SIZE + column % PANEL_SIZE
                is_whole = index < m.outputs
                index += column // PANEL_SIZE * m.outputs
            index -= a.first_row
            if is_whole and 0 <= index < a.num_rows:
                integers = uint8s(a.integers + index * m.inputs, (m.inputs,))
                for block in range(m.num_blocks):
                    first, size = _inputs_of(m, block)
                    row[:size] = integers[first : first + size]
                    row[size:] = 0
                    at = m.panels + pair * m.pair_bytes + block * m.block_bytes + m.first_byte
                    _write_column(m, numbers, at, column)
        pair = claim(task)


fill = ThreadedKernel(_fill, needs=INT8.features)
