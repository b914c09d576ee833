"""What several parts of the work found of the same queries, brought together: see `chunks`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda_kernels.cpu.attention.chunk_plan import Arguments, Merge
from pagoda_kernels.cpu.compiled import Array, address_of, compiled, exp2, fill
from pagoda_kernels.cpu.formats import floats
from pagoda_kernels.cpu.panels import BF16, GROUP_SIZE, VECTOR_BYTES, narrow_panel
from pagoda_kernels.cpu.threads import Task, ThreadedKernel, claim, make_reader

_arguments, _merge_of = make_reader(Arguments), make_reader(Merge)
_MERGE_BYTES = 8 * len(Merge._fields)


@compiled
def write_row(sums_at: int, num_rows: int, head_dim: int, total: Any, to: int) -> None:
    """A row's sums divided by its total of weights, in bf16; the sums are overwritten."""
    for column in range(head_dim // GROUP_SIZE):
        at = sums_at + 4 * column * num_rows * GROUP_SIZE
        sums = floats(at, (GROUP_SIZE,))
        for i in range(GROUP_SIZE):
            sums[i] /= total
        narrow_group(at, to + 2 * column * GROUP_SIZE)


@compiled
def narrow_group(numbers_at: int, to: int) -> None:
    narrow_panel(numbers_at, to)
    narrow_panel(numbers_at + VECTOR_BYTES, to + VECTOR_BYTES // 2)


def _merge_parts(task: Task) -> None:
    """A part of the work is a Merge of the plan for GROUP_SIZE dimensions of one key head."""
    a = _arguments(task)
    num_columns = a.head_dim // GROUP_SIZE
    own = np.empty(GROUP_SIZE, np.float32)
    part = claim(task)
    while part < a.num_merges * a.num_kv_heads * num_columns:
        column, head = part % num_columns, part // num_columns % a.num_kv_heads
        merge = _merge_of(a.merges + part // (num_columns * a.num_kv_heads) * _MERGE_BYTES)
        _merge_columns(a, merge, head, column, own)
        part = claim(task)


merge_parts = ThreadedKernel(_merge_parts, needs=BF16.features)


@compiled
def _merge_columns(a: Any, merge: Any, head: int, column: int, sums: Array) -> None:
    scale, group = np.float32(a.scale), a.num_heads // a.num_kv_heads
    num_rows = merge.num_tokens * group
    stride = 4 * a.partial_size * a.num_kv_heads
    begin = a.partials + stride * merge.first_partial + 4 * a.partial_size * head
    for row in range(num_rows):
        state = begin + 4 * (num_rows * a.head_dim + row)
        most, total = np.float32(-np.inf), np.float32(0)
        for i in range(merge.num_partials):
            most = max(most, floats(state + i * stride, (1,))[0])
        fill(sums, np.float32(0))
        for i in range(merge.num_partials):
            factor = exp2((floats(state + i * stride, (1,))[0] - most) * scale)
            total += factor * floats(state + i * stride + 4 * num_rows, (1,))[0]
            at = begin + i * stride + 4 * (column * num_rows + row) * GROUP_SIZE
            others = floats(at, (GROUP_SIZE,))
            for j in range(GROUP_SIZE):
                sums[j] += factor * others[j]
        token, i = merge.first_token + row // group, head * group + row % group
        to = a.out + 2 * ((token * a.num_heads + i) * a.head_dim + column * GROUP_SIZE)
        write_row(address_of(sums), 1, GROUP_SIZE, total, to)
