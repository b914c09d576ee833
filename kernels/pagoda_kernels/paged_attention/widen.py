"""Numbers of 8 bits, in words of two as a cache has them, widened to fp16 for products.

fp16 holds all of them exactly, and takes fewer instructions to reach than bf16. The two numbers of
a word become two tensors, so none of them has to change places.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info

# Two words in $2, their lower numbers to $0, the upper ones to $1. Left to itself the compiler
# takes three times as many instructions.
_E4M3 = """{
    .reg .b32 bytes;
    .reg .b16 lower, upper;
    prmt.b32 bytes, $2, 0, 0x3120;
    mov.b32 {lower, upper}, bytes;
    cvt.rn.f16x2.e4m3x2 $0, lower;
    cvt.rn.f16x2.e4m3x2 $1, upper;
    }"""
# Without an instruction: e4m3's exponent and fraction in the lowest places of fp16's, whose bias is
# 8 more.
_E4M3_BITS = """{
    .reg .b32 lower, upper, rest;
    prmt.b32 lower, $2, 0, 0x2404;
    and.b32 upper, $2, 0xff00ff00;
    shr.b32 rest, lower, 1;
    and.b32 rest, rest, 0x3f803f80;
    lop3.b32 $0, lower, 0x80008000, rest, 0xea;
    shr.b32 rest, upper, 1;
    and.b32 rest, rest, 0x3f803f80;
    lop3.b32 $1, upper, 0x80008000, rest, 0xea;
    }"""
# fp16 with fewer places after the point.
_E5M2 = """{
    prmt.b32 $0, $2, 0, 0x2404;
    and.b32 $1, $2, 0xff00ff00;
    }"""
# 1024 + 128 + the number, whose lowest bits fp16 has in the places of an integer's; minus 1152.
_INT8 = """{
    .reg .b32 bytes, bias;
    mov.b32 bias, 0x64806480;
    lop3.b32 $0, $2, 0x00ff00ff, bias, 0x6a;
    prmt.b32 bytes, $2, 0, 0x4341;
    xor.b32 $1, bytes, bias;
    sub.rn.f16x2 $0, $0, bias;
    sub.rn.f16x2 $1, $1, bias;
    }"""


@triton.jit
def widen(words, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """The lower and the upper numbers of int16 words, in a dtype, times 1 / unit(FORMAT)."""
    PTX: tl.constexpr = find_ptx(FORMAT)
    if PTX is None:
        lower = widen_byte(words & 0xFF, FORMAT)
        upper = widen_byte((words >> 8) & 0xFF, FORMAT)
    else:
        lower, upper = tl.inline_asm_elementwise(
            PTX, "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    return lower.to(dtype), upper.to(dtype)


@triton.jit
def widen_byte(bits, FORMAT: tl.constexpr):
    """The number whose bits are the lowest 8 of an int16."""
    if FORMAT == "int8":
        return (bits ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    elif FORMAT == "e5m2":
        return (bits << 8).to(tl.float16, bitcast=True)
    else:
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def unit(FORMAT: tl.constexpr):
    """What numbers are divided by in `widen`."""
    return 256.0 if FORMAT == "e4m3" and not target_info.cuda_capability_geq(8, 9) else 1.0


@triton.constexpr_function
def find_ptx(name: str) -> str | None:
    """The assembly for the target; the interpreter and AMD have none."""
    target = target_info.current_target()
    if target is None or target.backend != "cuda":
        return None
    e4m3 = _E4M3 if target_info.cuda_capability_geq(8, 9) else _E4M3_BITS
    return {"e4m3": e4m3, "e5m2": _E5M2, "int8": _INT8}[name]
