"""The loops of `pagoda_kernels.cpu.int8_argmax`: see `pagoda_kernels.cpu.compiled`."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from pagoda_kernels.cpu.compiled import Array, Kernel, address_of, compiled, emitted
from pagoda_kernels.cpu.formats import bf16_bits, floats, int32s, int64s, uint8s, widen, widened
from pagoda_kernels.cpu.panels import (
    BYTES_PER_STEP,
    GROUP_SIZE,
    INT8,
    MOST_ROWS,
    PANEL_SIZE,
    VECTOR_BYTES,
    keep_largest_panel,
    make_dot,
)
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, claim

CHUNK_GROUPS = 16
"""Groups of panels whose largest logits are kept together, column by column."""

PART_ROWS = 256
"""Rows that a thread rounds at a time."""

_INT8_MAX = np.float32(127)

_dot = make_dot(INT8)


def _quantize_rows(task: Task) -> None:
    """Arguments: matrix, offset, integers, scales, sums, squares, num_rows, size, rotation_size.

    A part is PART_ROWS rows. See `pagoda_kernels.cpu.int8_argmax.quantize`.
    """
    offset, num_rows, size, rotation_size = task[2], task[7], task[8], task[9]
    matrix, integers = bf16_bits(task[1], (num_rows, size)), uint8s(task[3], (num_rows, size))
    scales, sums = floats(task[4], (num_rows,)), int32s(task[5], (num_rows,))
    squares, x = floats(task[6], (num_rows, 2)), np.empty(size, np.float32)
    # The transform makes numbers larger by the square root of its size.
    shrink = np.float32(1) / np.sqrt(np.float32(rotation_size))
    first = claim(task) * PART_ROWS
    while first < num_rows:
        for row in range(first, min(first + PART_ROWS, num_rows)):
            widen(matrix[row], x)
            _rotate(x, rotation_size)
            largest = np.float32(1e-30)
            for i in range(size):
                largest = max(largest, abs(x[i]))
            scales[row] = largest * shrink / _INT8_MAX
            squares[row, 0], squares[row, 1], sums[row] = _round(
                x, _INT8_MAX / largest, np.int32(offset), integers[row]
            )
        first = claim(task) * PART_ROWS


quantize_rows = ThreadedKernel(_quantize_rows)


@compiled
def _round(x: Array, factor: Any, offset: Any, integers: Array) -> Any:
    """The sums of squares of the roundings and of the rounded numbers, and their sum."""
    rounding = total = np.float32(0)
    all_of_them = np.int32(0)
    for i in range(x.size):
        number = x[i] * factor
        whole = np.rint(number)
        integer = np.int32(whole)
        integers[i] = np.uint8((integer + offset) & np.int32(255))
        total += whole * whole
        rounding += (number - whole) * (number - whole)
        all_of_them += integer
    return rounding, total, all_of_them


@emitted()
def _rotate_panel(b: Any, numbers: Any) -> None:
    """The transform of PANEL_SIZE fp32 numbers at an address, in place."""
    kind = ir.VectorType(ir.FloatType(), PANEL_SIZE)
    places = ir.VectorType(ir.IntType(32), PANEL_SIZE)
    at = b.inttoptr(numbers, kind.as_pointer())
    vector = b.load(at, align=4)
    for half in (1, 2, 4, 8):
        order = ir.Constant(places, [i ^ half for i in range(PANEL_SIZE)])
        signs = ir.Constant(kind, [-1.0 if i & half else 1.0 for i in range(PANEL_SIZE)])
        partner = b.shuffle_vector(vector, vector, order)
        vector = b.fadd(partner, b.fmul(vector, signs))
    b.store(vector, at, align=4)


@compiled
def _rotate(x: Array, rotation_size: int) -> None:
    """The fast Walsh-Hadamard transform, without its factor, which does not matter here."""
    half = 1
    if rotation_size >= PANEL_SIZE:
        for i in range(0, x.size, PANEL_SIZE):
            _rotate_panel(address_of(x) + 4 * i)
        half = PANEL_SIZE
    while half < rotation_size:
        for start in range(0, x.size, 2 * half):
            for i in range(start, start + half):
                above, below = x[i], x[i + half]
                x[i] = above + below
                x[i + half] = above - below
        half *= 2


def _find_largest(task: Task) -> None:
    """Arguments: panels, num_groups, integers, num_rows, in_features, offsets, scales, largest."""
    panels, num_groups, x, num_rows, stride = task[1], task[2], task[3], task[4], task[5]
    offsets, scales = task[6], task[7]
    num_chunks = (num_groups + CHUNK_GROUPS - 1) // CHUNK_GROUPS
    largest = floats(task[8], (num_rows, num_chunks, GROUP_SIZE))
    sums = np.zeros((MOST_ROWS, GROUP_SIZE), np.int32)
    at, group_bytes = address_of(sums), GROUP_SIZE * stride
    num_passes = (num_rows + MOST_ROWS - 1) // MOST_ROWS
    chunk = claim(task)
    while chunk < num_chunks:
        following = claim(task)
        for row in range(num_rows):
            for i in range(GROUP_SIZE):
                largest[row, chunk, i] = -np.inf
        last = min((chunk + 1) * CHUNK_GROUPS, num_groups)
        for group in range(chunk * CHUNK_GROUPS, last):
            # Each pass asks for its part of the group that this thread has next.
            next_group = group + 1 if group + 1 < last else following * CHUNK_GROUPS
            ahead = panels + min(next_group, num_groups - 1) * group_bytes
            initial, scale = offsets + group * GROUP_SIZE * 4, scales + group * GROUP_SIZE * 4
            row = 0
            while row < num_rows:
                rows = _dot(
                    panels + group * group_bytes,
                    stride // BYTES_PER_STEP,
                    x + row * stride,
                    stride,
                    num_rows - row,
                    initial,
                    0,
                    at,
                    ahead,
                    2 * VECTOR_BYTES // num_passes,
                )
                ahead += group_bytes // num_passes
                for i in range(rows):
                    _keep_largest(sums[i], scale, largest[row + i, chunk])
                row += rows
        chunk = following


find_largest = ThreadedKernel(_find_largest, needs=INT8.features)


@compiled
def _keep_largest(sums: Array, scale: int, largest: Array) -> None:
    for i in range(0, GROUP_SIZE, PANEL_SIZE):
        keep_largest_panel(address_of(sums) + 4 * i, scale + 4 * i, address_of(largest) + 4 * i)


@Kernel
def choose(
    hidden_at: int,
    table_at: int,
    largest_at: int,
    errors_at: int,
    tokens_at: int,
    num_rows: int,
    size: int,
    vocab_size: int,
    num_chunks: int,
    most_candidates: int,
) -> None:
    """See `pagoda_kernels.cpu.int8_argmax.choose_tokens`."""
    hidden = bf16_bits(hidden_at, (num_rows, size))
    table = bf16_bits(table_at, (vocab_size, size))
    largest = floats(largest_at, (num_rows, num_chunks, GROUP_SIZE))
    errors, tokens = floats(errors_at, (num_rows,)), int64s(tokens_at, (num_rows,))
    candidates, x = np.empty(most_candidates, np.int64), np.empty(size, np.float32)
    for row in range(num_rows):
        best = np.float32(-np.inf)
        for chunk in range(num_chunks):
            best = max(best, _largest(largest[row, chunk]))
        floor = best - np.float32(2) * errors[row]
        count = _collect(largest[row], floor, vocab_size, candidates)
        if count > most_candidates:
            tokens[row] = -1
        elif count == 0:
            # Not a number: there is no largest.
            tokens[row] = vocab_size - 1
        else:
            widen(hidden[row], x)
            tokens[row] = _argmax(x, table, candidates, count)


@compiled
def _largest(numbers: Array) -> Any:
    best = numbers[0]
    for i in range(numbers.size):
        best = max(best, numbers[i])
    return best


@compiled
def _collect(largest: Array, floor: Any, vocab_size: int, candidates: Array) -> int:
    """How many tokens may have a logit that reaches the floor; the first of them are candidates."""
    count = 0
    for chunk in range(len(largest)):
        if _largest(largest[chunk]) >= floor:
            for column in range(GROUP_SIZE):
                if largest[chunk, column] >= floor:
                    first = chunk * CHUNK_GROUPS * GROUP_SIZE + column
                    last = min(first + CHUNK_GROUPS * GROUP_SIZE, vocab_size)
                    for token in range(first, last, GROUP_SIZE):
                        if count < candidates.size:
                            candidates[count] = token
                        count += 1
    return count


@compiled
def _argmax(x: Array, table: Array, candidates: Array, count: int) -> int:
    best, token = np.float32(-np.inf), candidates[0]
    for i in range(count):
        candidate = candidates[i]
        logit = _exact(x, table[candidate])
        if logit > best or (logit == best and candidate < token):
            best, token = logit, candidate
    return int(token)


@compiled
def _exact(x: Array, bits: Array) -> Any:
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * widened(bits[i])
    return total
