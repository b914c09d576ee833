"""Products of rows with a matrix packed in panels, by the processor's own dot products.

A panel holds PANEL_SIZE rows of the matrix, which are columns of the result. One vector of it holds
4 bytes of each: 2 numbers in bf16, or 4 in int8. The processor multiplies such a vector by 4 bytes
of x, repeated, and adds the products to PANEL_SIZE sums in one instruction. Two panels lie next to
each other, vector by vector, as a group: a thread reads memory from its beginning to its end, and
asks for what it will need before it does, so that reading and multiplying go on at the same time.

Every sum is made in the order of the numbers, whatever the number of rows: a row's result does not
depend on its neighbours. A processor without a product of bf16 widens both sides in registers.

Instructions: VDPBF16PS (AVX512-BF16), VPDPBUSD (AVX512-VNNI) and VPERMI2B (AVX512-VBMI), Intel's
Software Developer's Manual, volume 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types

from pagoda_kernels.cpu.compiled import Array, address_of, compiled, emit_prefetch, emitted
from pagoda_kernels.cpu.targets import features

PANEL_SIZE = 16
GROUP_SIZE = 2 * PANEL_SIZE
BYTES_PER_STEP = 4
"""Of each row of the matrix, and of x."""
VECTOR_BYTES = PANEL_SIZE * BYTES_PER_STEP
STEP_BYTES = 2 * VECTOR_BYTES
"""Of a group of panels."""
MOST_ROWS = 8
"""Rows of x at a time: 16 sums of 32 registers; with 12 or 16 they are no faster."""
# Of the 16 half as long registers of AVX2: with more, sums go to memory and back at each step.
_MOST_ROWS_IN_HALVES = 4

_INT32, _INT64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_INT32S = ir.VectorType(_INT32, PANEL_SIZE)
_FLOATS = ir.VectorType(_FLOAT, PANEL_SIZE)
_BYTES = ir.VectorType(ir.IntType(8), VECTOR_BYTES)
_FMA = "llvm.fma.v16f32"


class Numbers(NamedTuple):
    """What a matrix in panels holds."""

    multiplied_bytes: int
    """Of a number, as the instruction that multiplies takes it."""
    features: frozenset[str]
    """Of the processor, as LLVM names them."""


BF16 = Numbers(2, frozenset({"avx2", "fma"}))
INT8 = Numbers(1, frozenset({"avx512vnni"}))
"""Multiplied by rows of uint8."""
E4M3 = Numbers(2, frozenset({"avx512bf16", "avx512vbmi"}))
"""Widened on the way to the product with rows of bf16, exactly."""


def has_panels(numbers: Numbers) -> bool:
    """Whether this processor has the instructions."""
    return numbers.features <= features()


def _has_whole_vectors() -> bool:
    return "avx512f" in features()


def describe_products(dtype: torch.dtype) -> str:
    """How a model in this dtype multiplies by quantized matrices here, for the log."""
    widened = f"widened to {str(dtype).removeprefix('torch.')} when they were loaded"
    ways = [
        way if dtype is torch.bfloat16 and has_panels(numbers) else widened
        for numbers, way in (
            (INT8, "multiplied by rows in 8 bits (AVX512-VNNI)"),
            (E4M3, "widened in registers (AVX512-bf16, AVX512-VBMI)"),
        )
    ]
    return f"Matrices of whole numbers are {ways[0]}, those of 8-bit floats {ways[1]}"


@compiled
def empty_panels(num_numbers: int) -> Array:
    """Inside a kernel: memory for bf16 numbers in panels, from the beginning of a vector on."""
    memory = np.empty(num_numbers + VECTOR_BYTES // 2, np.uint16)
    skipped = -address_of(memory) % VECTOR_BYTES // 2
    return memory[skipped : skipped + num_numbers]


def make_dot(numbers: Numbers) -> Any:
    """A function for kernels: the product of the next rows of x with one group of panels.

    It multiplies as many rows as one pass can, at most MOST_ROWS, and returns their number. Its
    arguments: the address of the group, the number of its steps, the address of x, the bytes of a
    row of x, the number of rows, the address of [GROUP_SIZE] numbers to begin with and the bytes to
    those of the next row, an address for [rows, GROUP_SIZE] sums: fp32 for rows of bf16, int32 for
    uint8; and what to ask memory for meanwhile, an address and the bytes from one step to the next.
    """

    @emitted(types.int64)
    def dot(
        b: Any,
        group: Any,
        num_steps: Any,
        x: Any,
        row_bytes: Any,
        num_rows: Any,
        initial: Any,
        initial_stride: Any,
        sums: Any,
        ahead: Any,
        ahead_stride: Any,
    ) -> Any:
        others = (num_steps, x, row_bytes, initial, initial_stride, sums, ahead, ahead_stride)

        def emit(rows: int) -> None:
            is_in_turn = rows > 2 and not _has_whole_vectors()
            for panels in ((0,), (1,)) if is_in_turn else ((0, 1),):
                _emit_dot(b, numbers, rows, panels, group, *others)

        return emit_by_rows(b, num_rows, emit)

    return dot


def emit_by_rows(b: Any, num_rows: Any, emit: Callable[[int], None]) -> Any:
    """emit(rows) for the most rows of x that one pass can multiply, and their number."""
    end = b.append_basic_block("end")
    ends = []
    most = MOST_ROWS if _has_whole_vectors() else _MOST_ROWS_IN_HALVES
    for rows in (it for it in (8, 4, 2, 1) if it <= most):
        smaller = b.append_basic_block("smaller")
        if rows > 1:
            enough = b.append_basic_block("enough")
            b.cbranch(b.icmp_signed(">=", num_rows, _INT64(rows)), enough, smaller)
            b.position_at_end(enough)
        emit(rows)
        ends.append((_INT64(rows), b.block))
        b.branch(end)
        b.position_at_end(smaller)
    b.unreachable()
    b.position_at_end(end)
    multiplied = b.phi(_INT64)
    for rows, block in ends:
        multiplied.add_incoming(rows, block)
    return multiplied


def _emit_dot(
    b: Any,
    numbers: Numbers,
    num_rows: int,
    panels: tuple[int, ...],
    group: Any,
    steps: Any,
    x: Any,
    stride: Any,
    initial: Any,
    initial_stride: Any,
    out: Any,
    ahead: Any,
    ahead_stride: Any,
) -> None:
    sums_type = _FLOATS if numbers.multiplied_bytes == 2 else _INT32S
    begin = []
    for row in range(num_rows):
        at = b.add(initial, b.mul(initial_stride, _INT64(row)))
        begin += [load_at(b, at, i * VECTOR_BYTES, sums_type) for i in panels]
    before = b.block
    loop, done = b.append_basic_block("step"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    step = b.phi(_INT64)
    step.add_incoming(_INT64(0), before)
    sums = [b.phi(sums_type) for _ in range(len(panels) * num_rows)]
    vectors = [_load_vectors(b, numbers, group, step)[i] for i in panels]
    if 0 in panels:
        wanted = b.add(ahead, b.mul(step, ahead_stride))
        emit_prefetch(b, wanted, 2)
        emit_prefetch(b, b.add(wanted, b.ashr(ahead_stride, _INT64(1))), 2)
    results: list[Any] = []
    for row in range(num_rows):
        at = b.add(b.add(x, b.mul(stride, _INT64(row))), b.mul(step, _INT64(BYTES_PER_STEP)))
        repeated = repeat(b, b.load(_pointer(b, at, _INT32)))
        for vector in vectors:
            results.append(_emit_multiply(b, numbers, sums[len(results)], repeated, vector))
    for total, result, number in zip(sums, results, begin, strict=True):
        total.add_incoming(number, before)
        total.add_incoming(result, loop)
    next_step = b.add(step, _INT64(1))
    step.add_incoming(next_step, loop)
    b.cbranch(b.icmp_signed("<", next_step, steps), loop, done)
    b.position_at_end(done)
    places = [2 * row + i for row in range(num_rows) for i in panels]
    for place, result in zip(places, results, strict=True):
        b.store(result, _pointer(b, b.add(out, _INT64(place * VECTOR_BYTES)), sums_type), align=4)


def _load_vectors(b: Any, numbers: Numbers, group: Any, step: Any) -> list[Any]:
    """A step's numbers of both panels."""
    if numbers is E4M3:
        at = b.add(group, b.mul(step, _INT64(VECTOR_BYTES)))
        return _widen_vector(b, load_at(b, at, 0, _BYTES))
    at = b.add(group, b.mul(step, _INT64(2 * VECTOR_BYTES)))
    return [load_at(b, at, i * VECTOR_BYTES, _INT32S) for i in range(2)]


def _widen_vector(b: Any, coded: Any) -> list[Any]:
    """Two vectors of bf16 from one of e4m3: a sign and a magnitude, whose bf16 a table has."""
    lookup_type = ir.FunctionType(_BYTES, [_BYTES] * 3)
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    lookup = b.module.declare_intrinsic(name, [], lookup_type)
    bits = (
        torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).bfloat16().view(torch.int16)
    )
    low, high = (
        b.call(lookup, [ir.Constant(_BYTES, half[:64]), coded, ir.Constant(_BYTES, half[64:])])
        for half in ((bits & 255).tolist(), (bits >> 8).tolist())
    )
    sign = b.and_(coded, ir.Constant(_BYTES, [128] * 64))
    high = b.or_(high, sign)
    vectors = []
    for half in range(2):
        # Within each 16 bytes, as the processor's unpack instructions have it.
        first = [lane * 16 + half * 8 + i for lane in range(4) for i in range(8)]
        order = [index for i in first for index in (i, 64 + i)]
        mask = ir.Constant(ir.VectorType(_INT32, 64), order)
        vectors.append(b.bitcast(b.shuffle_vector(low, high, mask), _INT32S))
    return vectors


def _emit_multiply(b: Any, numbers: Numbers, sums: Any, repeated: Any, vector: Any) -> Any:
    """sums + x * vector, over the numbers of a step. All as 32 bits, whatever is in them."""
    if numbers.multiplied_bytes == 2 and "avx512bf16" not in features():
        fma = b.module.declare_intrinsic(_FMA, [], ir.FunctionType(_FLOATS, [_FLOATS] * 3))
        for x, y in zip(_widen_pairs(b, repeated), _widen_pairs(b, vector), strict=True):
            sums = b.call(fma, [x, y, sums])
        return sums
    is_bytes = numbers.multiplied_bytes == 1
    name = "llvm.x86.avx512.vpdpbusd.512" if is_bytes else "llvm.x86.avx512bf16.dpbf16ps.512"
    function = ir.FunctionType(sums.type, [sums.type, _INT32S, _INT32S])
    intrinsic = b.module.declare_intrinsic(name, [], function)
    return b.call(intrinsic, [sums, repeated, vector])


def _widen_pairs(b: Any, vector: Any) -> tuple[Any, Any]:
    """The first and the second of each two bf16 numbers, in fp32, whose upper half they are."""
    shift, mask = (ir.Constant(_INT32S, [n] * PANEL_SIZE) for n in (16, 0xFFFF0000))
    return b.bitcast(b.shl(vector, shift), _FLOATS), b.bitcast(b.and_(vector, mask), _FLOATS)


def repeat(b: Any, number: Any) -> Any:
    """A vector of PANEL_SIZE times a number of 32 bits."""
    undefined = ir.Constant(ir.VectorType(number.type, PANEL_SIZE), ir.Undefined)
    first = b.insert_element(undefined, number, _INT32(0))
    return b.shuffle_vector(first, undefined, ir.Constant(_INT32S, [0] * PANEL_SIZE))


@emitted()
def narrow_panel(b: Any, numbers: Any, out: Any) -> None:
    """PANEL_SIZE fp32 numbers at an address, rounded to bf16 at another; NaN stays NaN."""
    kind = ir.VectorType(ir.IntType(16), PANEL_SIZE)
    number = load_at(b, numbers, 0, _FLOATS)
    bits = b.bitcast(number, _INT32S)
    shift, one, half = (ir.Constant(_INT32S, [n] * PANEL_SIZE) for n in (16, 1, 0x7FFF))
    # Of two that are as near, the even one.
    rounding = b.add(b.and_(b.lshr(bits, shift), one), half)
    nan = ir.Constant(_INT32S, [0x7FC00000] * PANEL_SIZE)
    rounded = b.select(b.fcmp_unordered("uno", number, number), nan, b.add(bits, rounding))
    b.store(b.trunc(b.lshr(rounded, shift), kind), _pointer(b, out, kind), align=2)


@emitted()
def widen_step(b: Any, source: Any, target: Any) -> None:
    """A step of E4M3 at an address, as one of BF16 at another."""
    for i, vector in enumerate(_widen_vector(b, load_at(b, source, 0, _BYTES))):
        at = b.add(target, _INT64(i * VECTOR_BYTES))
        b.store(vector, _pointer(b, at, _INT32S), align=4)


@emitted()
def transpose_panel(b: Any, addresses: Any, offset: Any, to: Any, stride: Any) -> None:
    """PANEL_SIZE rows of 64 bytes as PANEL_SIZE vectors of 4 bytes of each row.

    Args: addresses: where the rows' are; offset: added to them; stride: of the vectors, in bytes.
    """
    vectors = []
    for i in range(PANEL_SIZE):
        at = b.load(_pointer(b, b.add(addresses, _INT64(8 * i)), _INT64))
        vectors.append(load_at(b, b.add(at, offset), 0, _INT32S))
    # Squares of 1, 2, 4 and 8 are exchanged across the diagonal.
    for size in (1, 2, 4, 8):
        masks = [
            ir.Constant(_INT32S, order)
            for order in (
                [j if not j & size else PANEL_SIZE + j - size for j in range(PANEL_SIZE)],
                [j + size if not j & size else PANEL_SIZE + j for j in range(PANEL_SIZE)],
            )
        ]
        for i in range(PANEL_SIZE):
            if not i & size:
                pair = vectors[i], vectors[i + size]
                vectors[i], vectors[i + size] = (b.shuffle_vector(*pair, m) for m in masks)
    for i, vector in enumerate(vectors):
        at = b.add(to, b.mul(stride, _INT64(i)))
        b.store(vector, _pointer(b, at, _INT32S), align=4)


@emitted()
def interleave_group(b: Any, even: Any, odd: Any, to: Any) -> None:
    """GROUP_SIZE bf16 numbers of two rows as a step of a group of panels, all by address."""
    kind = ir.VectorType(ir.IntType(16), GROUP_SIZE)
    rows = [b.load(_pointer(b, at, kind), align=2) for at in (even, odd)]
    for panel in range(2):
        first = range(panel * PANEL_SIZE, (panel + 1) * PANEL_SIZE)
        order = [index for i in first for index in (i, GROUP_SIZE + i)]
        mask = ir.Constant(ir.VectorType(_INT32, GROUP_SIZE), order)
        vector = b.shuffle_vector(*rows, mask)
        at = b.add(to, _INT64(panel * VECTOR_BYTES))
        b.store(vector, _pointer(b, at, kind), align=2)


@emitted()
def keep_largest_panel(b: Any, sums: Any, scales: Any, largest: Any) -> None:
    """largest = max(largest, sums * scales), of PANEL_SIZE int32 and fp32 numbers, by address."""
    whole = load_at(b, sums, 0, _INT32S)
    number = b.fmul(b.sitofp(whole, _FLOATS), load_at(b, scales, 0, _FLOATS))
    so_far = load_at(b, largest, 0, _FLOATS)
    kept = b.select(b.fcmp_ordered(">", number, so_far), number, so_far)
    b.store(kept, _pointer(b, largest, _FLOATS), align=4)


@emitted()
def scale_group(b: Any, sums: Any, scales: Any, bias: Any) -> None:
    """sums = sums * scales + bias, of GROUP_SIZE fp32 numbers, by address."""
    _emit_fma(b, sums, scales, bias, to=sums)


@emitted()
def add_scaled_group(b: Any, sums: Any, scales: Any, total: Any) -> None:
    """total += sums * scales, of GROUP_SIZE fp32 numbers, by address."""
    _emit_fma(b, sums, scales, total, to=total)


def _emit_fma(b: Any, *factors_and_term: Any, to: Any) -> None:
    # A loop that numba compiles for rows of arrays takes several times as long.
    fma = b.module.declare_intrinsic(_FMA, [], ir.FunctionType(_FLOATS, [_FLOATS] * 3))
    for offset in (0, VECTOR_BYTES):
        parts = [load_at(b, at, offset, _FLOATS) for at in factors_and_term]
        b.store(b.call(fma, parts), _pointer(b, b.add(to, _INT64(offset)), _FLOATS), align=4)


def load_at(b: Any, at: Any, offset_bytes: int, kind: Any) -> Any:
    return b.load(_pointer(b, b.add(at, _INT64(offset_bytes)), kind), align=4)


def _pointer(b: Any, at: Any, kind: Any) -> Any:
    return b.inttoptr(at, kind.as_pointer())
