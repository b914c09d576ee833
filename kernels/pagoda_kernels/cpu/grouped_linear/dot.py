"""Dot products of whole numbers: rows of x with two panels of a matrix, block by block of inputs.

A block's products are added up in int32 by VPDPBUSD, exactly; then the sums are multiplied by the
scales of the matrix's columns and by that of the row of x, and added up in fp32.

See `pagoda_kernels.cpu.panels`; a panel's numbers are unsigned here, and those of x signed. Numbers
of 4 bits lie two to a byte, the second panel's above the first's. What numbers of 5 and 6 bits have
above them, and all of 2 and 3 bits, lies in planes of a bit of each, which are masks to add it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types

from pagoda_kernels.cpu.compiled import emit_prefetch, emitted
from pagoda_kernels.cpu.panels import (
    BYTES_PER_STEP,
    GROUP_SIZE,
    PANEL_SIZE,
    STEP_BYTES,
    VECTOR_BYTES,
    emit_by_rows,
    load_at,
    repeat,
)

HEAD_BYTES = 16
"""Before each block of a row of x: its scale in fp32, what its sums begin with in int32, and minus
the sum of its numbers in fp32."""
PLANE_BYTES = STEP_BYTES // 8
"""Of a step of two panels."""
SCALES_BYTES = 2 * GROUP_SIZE
"""Of a block's scales in two panels, in fp16; as many are the zeros that may follow."""

_INT32, _INT64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_INT32S = ir.VectorType(_INT32, PANEL_SIZE)
_FLOATS = ir.VectorType(_FLOAT, PANEL_SIZE)
_HALVES = ir.VectorType(ir.HalfType(), PANEL_SIZE)
_BYTES = ir.VectorType(ir.IntType(8), VECTOR_BYTES)
_FLAGS = ir.VectorType(ir.IntType(1), VECTOR_BYTES)
_NIBBLES = ir.Constant(_INT32S, [0x0F0F0F0F] * PANEL_SIZE)


def steps_per_turn(bits: int) -> int:
    """A block has a multiple of them. In 6 bits there are groups of 16 inputs."""
    return 4 if bits == 6 else 8


def step_bytes(bits: int) -> int:
    """Of two panels. A turn has first its steps' nibbles, then one plane after the other."""
    return STEP_BYTES * bits // 8


def first_plane(bits: int) -> int:
    """The lowest bit that lies in a plane."""
    return 4 if bits >= 4 else 0


def make_dot(bits: int) -> Any:
    """A function for kernels: the product of the next rows of x with two panels.

    It multiplies as many rows as one pass can, at most MOST_ROWS, and returns their number.

    Arguments, addresses and numbers of bytes:
        weights, block_bytes: the first block's numbers, and from one block to the next.
        num_blocks, num_steps: num_steps of each block.
        scales, scales_stride: the first block's scales, and from one block to the next.
        has_zeros: whether zeros follow the scales.
        x, row_bytes, num_rows: rows of blocks, each with its head.
        sums: for [rows, GROUP_SIZE] fp32.
        ahead, ahead_block, ahead_first, ahead_step: what to ask memory for meanwhile, and from one
            block to the next, to its numbers, and from one step to the next.
    """

    @emitted(types.int64)
    def dot(
        b: Any,
        weights: Any,
        block_bytes: Any,
        num_blocks: Any,
        num_steps: Any,
        scales: Any,
        scales_stride: Any,
        has_zeros: Any,
        x: Any,
        row_bytes: Any,
        num_rows: Any,
        sums: Any,
        ahead: Any,
        ahead_block: Any,
        ahead_first: Any,
        ahead_step: Any,
    ) -> Any:
        def emit(rows: int) -> None:
            x_bytes = b.add(b.mul(num_steps, _INT64(BYTES_PER_STEP)), _INT64(HEAD_BYTES))
            starts = weights, scales, x, ahead
            strides = block_bytes, scales_stride, x_bytes, ahead_block
            begin = 2 * rows * [ir.Constant(_FLOATS, [0.0] * PANEL_SIZE)]
            loop = _Loop(b, num_blocks, starts, strides, begin)
            with loop as (weights_at, scales_at, x_at, ahead_at):
                heads = [b.add(x_at, b.mul(row_bytes, _INT64(row))) for row in range(rows)]
                whole = _emit_steps(
                    b, bits, num_steps, weights_at, heads, ahead_at, ahead_first, ahead_step
                )
                loop.results = _emit_scaling(b, whole, scales_at, has_zeros, heads, loop.sums)
            for i, result in enumerate(loop.results):
                at = b.inttoptr(b.add(sums, _INT64(i * VECTOR_BYTES)), result.type.as_pointer())
                b.store(result, at, align=4)

        return emit_by_rows(b, num_rows, emit)

    return dot


class _Loop:
    """Emits a loop of at least one turn; in it addresses advance, and sums are added to."""

    def __init__(
        self,
        b: Any,
        count: Any,
        starts: Sequence[Any],
        strides: Sequence[Any],
        sums: Sequence[Any] = (),
    ) -> None:
        self._b, self._count, self._strides = b, count, strides
        self._before, self._body = b.block, b.append_basic_block("turn")
        b.branch(self._body)
        b.position_at_end(self._body)
        self._turn = self._phi(_INT64(0))
        self._addresses = [self._phi(start) for start in starts]
        self.sums = [self._phi(start) for start in sums]
        self.results: Sequence[Any] = ()

    def _phi(self, start: Any) -> Any:
        value = self._b.phi(start.type)
        value.add_incoming(start, self._before)
        return value

    def __enter__(self) -> Sequence[Any]:
        return self._addresses

    def __exit__(self, *_: object) -> None:
        b = self._b
        turn = b.add(self._turn, _INT64(1))
        following = [b.add(*pair) for pair in zip(self._addresses, self._strides, strict=True)]
        end, done = b.block, b.append_basic_block("done")
        values = (self._turn, *self._addresses, *self.sums)
        for value, result in zip(values, (turn, *following, *self.results), strict=True):
            value.add_incoming(result, end)
        b.cbranch(b.icmp_signed("<", turn, self._count), self._body, done)
        b.position_at_end(done)


def _emit_steps(
    b: Any,
    bits: int,
    num_steps: Any,
    weights: Any,
    heads: Sequence[Any],
    ahead: Any,
    ahead_first: Any,
    ahead_step: Any,
) -> Sequence[Any]:
    """The int32 sums of a block: of both panels, row by row."""
    kind = ir.FunctionType(_INT32S, [_INT32S] * 3)
    multiply = b.module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", [], kind)
    begin = [repeat(b, load_at(b, head, 4, _INT32)) for head in heads for _ in range(2)]
    # What lies before a block's numbers.
    for offset in (0, VECTOR_BYTES):
        emit_prefetch(b, b.add(ahead, _INT64(offset)), 2)
    size, steps = step_bytes(bits), steps_per_turn(bits)
    starts = weights, _INT64(0), b.add(ahead, ahead_first)
    strides = [
        _INT64(steps * size),
        _INT64(steps * BYTES_PER_STEP),
        b.mul(ahead_step, _INT64(steps)),
    ]
    turns = b.ashr(num_steps, _INT64(steps.bit_length() - 1))
    loop = _Loop(b, turns, starts, strides, begin)
    with loop as (weights_at, offset, ahead_at):
        xs = [b.add(head, offset) for head in heads]
        sums = loop.sums
        for step in range(steps):
            vectors = _load_vectors(b, bits, weights_at, step)
            emit_prefetch(b, ahead_at, 2)
            if size > VECTOR_BYTES:
                emit_prefetch(b, b.add(ahead_at, b.ashr(ahead_step, _INT64(1))), 2)
            results = []
            for row, x in enumerate(xs):
                at = HEAD_BYTES + step * BYTES_PER_STEP
                repeated = repeat(b, load_at(b, x, at, _INT32))
                for i, vector in enumerate(vectors):
                    results.append(b.call(multiply, [sums[2 * row + i], vector, repeated]))
            sums = results
            ahead_at = b.add(ahead_at, ahead_step)
        loop.results = sums
    return sums


def _load_vectors(b: Any, bits: int, turn: Any, step: int) -> Sequence[Any]:
    """A step's numbers of both panels, in 8 bits."""
    if bits == 8:
        first = step * STEP_BYTES
        return [load_at(b, turn, first + i * VECTOR_BYTES, _INT32S) for i in range(2)]
    vectors, planes = [ir.Constant(_BYTES, [0] * VECTOR_BYTES)] * 2, 0
    if first_plane(bits):
        coded = load_at(b, turn, step * VECTOR_BYTES, _INT32S)
        shifted = b.lshr(coded, ir.Constant(_INT32S, [4] * PANEL_SIZE))
        vectors = [b.bitcast(b.and_(part, _NIBBLES), _BYTES) for part in (coded, shifted)]
        planes = steps_per_turn(bits) * VECTOR_BYTES
    for bit in range(first_plane(bits), bits):
        for i in range(2):
            at = planes + step * PLANE_BYTES + i * PLANE_BYTES // 2
            flags = b.bitcast(load_at(b, turn, at, _INT64), _FLAGS)
            added = b.add(vectors[i], ir.Constant(_BYTES, [1 << bit] * VECTOR_BYTES))
            vectors[i] = b.select(flags, added, vectors[i])
        planes += steps_per_turn(bits) * PLANE_BYTES
    return [b.bitcast(vector, _INT32S) for vector in vectors]


def _emit_scaling(
    b: Any,
    whole: Sequence[Any],
    scales: Any,
    has_zeros: Any,
    heads: Sequence[Any],
    sums: Sequence[Any],
) -> Sequence[Any]:
    """sums + (whole - zeros * the sum of x's numbers) * scales * the scale of x."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    fma = b.module.declare_intrinsic("llvm.fma.v16f32", [], kind)
    columns = [b.fpext(load_at(b, scales, 32 * i, _HALVES), _FLOATS) for i in range(2)]
    numbers = [b.sitofp(vector, _FLOATS) for vector in whole]
    ends = [(numbers, b.block)]
    with b.if_then(b.icmp_signed("!=", has_zeros, _INT64(0))):
        at = b.add(scales, _INT64(SCALES_BYTES))
        zeros = [b.fpext(load_at(b, at, 32 * i, _HALVES), _FLOATS) for i in range(2)]
        shifted = []
        for row, head in enumerate(heads):
            minus_sum = repeat(b, load_at(b, head, 8, _FLOAT))
            for i, zero in enumerate(zeros):
                shifted.append(b.call(fma, [zero, minus_sum, numbers[2 * row + i]]))
        ends.append((shifted, b.block))
    results = []
    for i in range(len(sums)):
        number = b.phi(_FLOATS)
        for values, block in ends:
            number.add_incoming(values[i], block)
        results.append(number)
    for row, head in enumerate(heads):
        scale = repeat(b, load_at(b, head, 0, _FLOAT))
        for i in range(2 * row, 2 * row + 2):
            factors = b.fmul(columns[i % 2], scale)
            results[i] = b.call(fma, [results[i], factors, sums[i]])
    return results
