"""Whole numbers out of words, widened for products: those of one run of columns at a time.

bf16 and fp16 have small whole numbers in the lowest bits of larger ones: 0x4300 | n is 128 + n in
bf16 for n below 128, and 0x6400 | n is 1024 + n in fp16 for n below 1024. Two words are widened at
once, to two numbers in a register; left to itself the compiler takes several times as many
instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info

from pagoda_kernels.grouped_linear.packing import PLANES, WORD_BITS


@triton.jit
def load_words(words_at, RUN: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr):
    """The words that have fields of a step's run, of each plane.

    words_at: the first words of the step; STRIDE: from one word of a lane to the next.
    """
    words = ()
    for plane in tl.static_range(num_planes(BITS)):
        words += (tl.load(words_at + find_field(BITS, plane, RUN)[0] * STRIDE),)  # type: ignore[assignment]
    return words


@triton.jit
def widen(
    words, zeros, RUN: tl.constexpr, BITS: tl.constexpr, IS_E4M3: tl.constexpr, dtype: tl.constexpr
):
    """The numbers of a step's run, minus their zeros, in a dtype.

    Args:
        words: see `load_words`.
        zeros: in the dtype, a column; None: 2 ** (BITS - 1); none of e4m3.
    """
    if not takes_ptx(dtype):
        numbers = tl.zeros_like(words[0])
        for plane in tl.static_range(num_planes(BITS)):
            numbers |= _cut_field(words[plane], plane, RUN, BITS)
        if IS_E4M3:
            # e4m3's exponent and fraction in fp16, whose bias is 8 more.
            bits = ((numbers & 0x80) << 8) | ((numbers & 0x7F) << 7)
            return (bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(dtype)
        elif zeros is None:
            return (numbers - 2 ** (BITS - 1)).to(dtype)
        else:
            return numbers.to(dtype) - zeros
    else:
        PTX: tl.constexpr = make_ptx(BITS, IS_E4M3, RUN, dtype, zeros is not None)
        REGISTERS: tl.constexpr = "=&r" + ",r" * (num_planes(BITS) + (zeros is not None))
        args = words
        if zeros is not None:
            args += (tl.broadcast_to(zeros, words[0].shape),)
        # The dtype itself: triton 3.6 to 3.9 do not take a constant of a caller here.
        if dtype == tl.float16:
            return tl.inline_asm_elementwise(PTX, REGISTERS, args, tl.float16, True, 2)
        else:
            return tl.inline_asm_elementwise(PTX, REGISTERS, args, tl.bfloat16, True, 2)


@triton.jit
def _cut_field(words, PLANE: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr):
    FIELD: tl.constexpr = find_field(BITS, PLANE, RUN)
    return ((words >> FIELD[1]) & FIELD[2]) << FIELD[3]


@triton.constexpr_function
def num_planes(bits: int) -> int:
    return len(PLANES[bits])


@triton.constexpr_function
def find_field(bits: int, plane: int, run: int) -> tuple[int, int, int, int]:
    """Where a plane has its part of a run's numbers: in which of a lane's words, from which bit on,
    the mask of its bits; and from which bit of the number on they belong.
    """
    widths = PLANES[bits]
    words_before = sum(widths[:plane]) // min(widths)
    word, index = divmod(run, WORD_BITS // widths[plane])
    return words_before + word, index * widths[plane], 2 ** widths[plane] - 1, sum(widths[:plane])


@triton.constexpr_function
def takes_ptx(dtype: tl.dtype) -> bool:
    """Not the interpreter, nor AMD; and assembly is for dtypes of 16 bits."""
    target = target_info.current_target()
    is_small = dtype == tl.float16 or dtype == tl.bfloat16
    return target is not None and target.backend == "cuda" and is_small


@triton.constexpr_function
def make_ptx(bits: int, is_e4m3: bool, run: int, dtype: tl.dtype, has_zeros: bool) -> str:
    """$0: two numbers of the words in $1 (and $2), minus the zeros in what follows."""
    if is_e4m3:
        lines = _e4m3_lines(run, dtype)
    else:
        lines = _integer_lines(bits, run, dtype, has_zeros)
    return "{" + "\n".join(lines) + "}"


@triton.constexpr_function
def _integer_lines(bits: int, run: int, dtype: tl.dtype, has_zeros: bool) -> list[str]:
    kind, one, base = "bf16x2", 0x3F80, 0x4300
    if dtype == tl.float16:
        kind, one, base = "f16x2", 0x3C00, 0x6400
    # The lowest eight bits are one too many for bf16.
    is_split = bits == 8 and dtype == tl.bfloat16
    lines = [".reg .b32 sum, word, offset, one;", f"mov.b32 one, {_twice(one)};"]
    lines.append(f"mov.b32 sum, {_twice(base)};")
    for plane in range(num_planes(bits)):
        _, first, mask, place = find_field(bits, plane, run)
        move = "shr" if first >= place else "shl"
        lines.append(f"{move}.b32 word, ${plane + 1}, {abs(first - place)};")
        mask = _twice(0x7F if is_split else mask << place)
        # (word & mask) | sum.
        lines.append(f"lop3.b32 sum, word, {mask}, sum, 0xea;")
    # Minus the base, and 2 ** (bits - 1), unless zeros are given.
    offset = 0x8000 | base | (0 if has_zeros else 2 ** (bits - 1))
    lines.append(f"mov.b32 offset, {_twice(0xC380 if is_split else offset)};")
    if is_split:
        # Minus 256, or 128 if the eighth bit is there: (word & 0x80) ^ offset. That is n - 128.
        lines.append(f"lop3.b32 offset, word, {_twice(0x80)}, offset, 0x6a;")
    lines.append(f"fma.rn.{kind} sum, sum, one, offset;")
    if has_zeros and is_split:
        # 128 - zeros is exact for whole zeros.
        lines.append(f"mov.b32 offset, {_twice(0x4300)};")
        lines.append(f"fma.rn.{kind} sum, sum, one, offset;")
    if has_zeros:
        lines.append(f"mov.b32 offset, {_twice(one | 0x8000)};")
        lines.append(f"fma.rn.{kind} sum, ${num_planes(bits) + 1}, offset, sum;")
    lines.append("mov.b32 $0, sum;")
    return lines


@triton.constexpr_function
def _e4m3_lines(run: int, dtype: tl.dtype) -> list[str]:
    """Run 0 has the lower bytes, run 1 the upper ones."""
    # e4m3's fraction in the highest places of the dtype's, whose bias is larger by the exponent of
    # `factor`.
    kind, place, factor = "bf16x2", 4, 0x7B80
    if dtype == tl.float16:
        kind, place, factor = "f16x2", 7, 0x5C00
    move = f"shl.b32 word, $1, {place}" if run == 0 else f"shr.b32 word, $1, {8 - place}"
    return [
        ".reg .b32 sum, word, factor, zero;",
        f"mov.b32 factor, {_twice(factor)};",
        f"mov.b32 zero, {_twice(0x8000)};",
        f"{move};",
        f"and.b32 sum, word, {_twice(0x7F << place)};",
        f"shl.b32 word, $1, {8 if run == 0 else 0};",
        f"lop3.b32 sum, word, {_twice(0x8000)}, sum, 0xea;",
        f"fma.rn.{kind} $0, sum, factor, zero;",
    ]


@triton.constexpr_function
def _twice(bits: int) -> str:
    return f"0x{bits << 16 | bits:08x}"
