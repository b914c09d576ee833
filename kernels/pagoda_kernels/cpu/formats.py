"""Numbers of 8, 16 and 32 bits, as kernels see them in memory, and their way to fp32 and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, models, overload, register_model

from pagoda_kernels.cpu.compiled import Array, compiled, exact
from pagoda_kernels.kv_cache import LARGEST


class _Float8(types.Type):  # type: ignore[misc]
    """Numbers that numba does not know: it reads and writes them, and the rest is here."""


@register_model(_Float8)
class _Float8Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: _Float8) -> None:
        super().__init__(manager, kind, ir.IntType(8))


_E4M3, _E5M2 = _Float8("e4m3"), _Float8("e5m2")


def _make_view(kind: Any) -> Any:
    def typed(_context: Any, address: Any) -> Any:
        pointer = types.CPointer(kind)

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(address), generate

    pointer_to: Any = intrinsic(typed)

    @compiled
    def view(address: int, shape: Any) -> Array:
        return carray(pointer_to(address), shape)

    return view


# Numbers at an address.
floats, uint8s = _make_view(types.float32), _make_view(types.uint8)
int8s, int32s, int64s = (_make_view(kind) for kind in (types.int8, types.int32, types.int64))
# numba does not know these, so they are seen as bits; those of fp16 signed, which tells them apart.
bf16_bits, fp16_bits = _make_view(types.uint16), _make_view(types.int16)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What models compute in."""
KV_DTYPES = tuple((dtype, kv_dtype) for dtype in DTYPES for kv_dtype in (dtype, *LARGEST))
"""What models compute in, with what their keys and values may be stored in."""
VIEWS: Mapping[torch.dtype, Any] = {
    torch.bfloat16: bf16_bits,
    torch.float16: fp16_bits,
    torch.float32: floats,
    torch.float8_e4m3fn: _make_view(_E4M3),
    torch.float8_e5m2: _make_view(_E5M2),
    torch.int8: int8s,
}
"""How a kernel sees numbers of a dtype; what is below knows what it sees."""


def is_common(dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
    """Whether kernels for them are compiled ahead: others are at their first call."""
    usual = torch.float8_e4m3fn, torch.int8
    return dtype is kv_dtype or (dtype is torch.bfloat16 and kv_dtype in usual)


UNITS: Mapping[torch.dtype, float] = {torch.float8_e4m3fn: 256.0}
"""What `widened` numbers are to be multiplied by, where that is not 1."""


def _emit_widened(b: Any, bits: Any, kind: Any) -> Any:
    int16, half, float32 = ir.IntType(16), ir.HalfType(), ir.FloatType()
    if kind == types.int16:
        return b.fpext(b.bitcast(bits, half), float32)
    if kind == types.uint16:
        wide = b.shl(b.zext(bits, ir.IntType(32)), ir.IntType(32)(16))
        return b.bitcast(wide, float32)
    if kind == _E4M3:
        # As fp16, whose exponent has a bit more: so it is 2**8 too small, numbers below the normal
        # ones too. The sign comes from the copies of it on the left.
        moved = b.and_(b.shl(b.sext(bits, int16), int16(7)), int16(0xBFFF))
        return b.fpext(b.bitcast(moved, half), float32)
    if kind == _E5M2:
        return b.fpext(b.bitcast(b.shl(b.zext(bits, int16), int16(8)), half), float32)
    if kind == types.int8:
        return b.sitofp(bits, float32)
    return bits


def _make_widened(_context: Any, number: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _emit_widened(builder, arguments[0], number)

    return types.float32(number), generate


widened: Any = intrinsic(_make_widened)
"""A number in fp32, divided by its dtype's unit, from what one of VIEWS shows of it."""


@compiled
def narrowed(number: Any) -> Any:
    """The bits of the bf16 number nearest to an fp32 one, the even one of two; NaN stays NaN."""
    bits = np.float32(number).view(np.uint32)
    rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    rounded = np.uint32(0x7FC00000) if is_nan else bits + rounding
    return np.uint16(rounded >> np.uint32(16))


def _make_half_bits(_context: Any, number: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


_half_bits: Any = intrinsic(_make_half_bits)


def _make_float8_bits(kind: _Float8, num_mantissa_bits: int, bias: int) -> Any:
    """A function for kernels: the nearest of these to an fp32 number that their range holds."""
    shift = np.uint32(23 - num_mantissa_bits)
    almost_half = np.uint32((1 << int(shift) - 1) - 1)
    offset = np.uint32((127 - bias) << num_mantissa_bits)
    least_normal = np.uint32((128 - bias) << 23)
    # Its last bit is the least number's: adding it rounds to whole ones of these.
    coarse = np.float32(2.0 ** (24 - bias - num_mantissa_bits))
    coarse_bits = coarse.view(np.uint32)

    def typed(_context: Any, bits: Any) -> Any:
        return kind(types.uint8), lambda _context, _builder, _signature, arguments: arguments[0]

    as_number: Any = intrinsic(typed)

    @exact
    def float8_bits(number: Any) -> Any:
        bits = np.float32(number).view(np.uint32)
        size = np.uint32(bits & np.uint32(0x7FFFFFFF))
        is_odd = np.uint32(np.uint32(size >> shift) & np.uint32(1))
        rounded = np.uint32(np.uint32(size + almost_half) + is_odd)
        normal = np.uint32(np.uint32(rounded >> shift) - offset)
        lifted = np.float32(np.uint32(size).view(np.float32) + coarse)
        small = np.uint32(np.float32(lifted).view(np.uint32) - coarse_bits)
        code = small if size < least_normal else normal
        sign = np.uint32(np.uint32(bits >> np.uint32(24)) & np.uint32(0x80))
        return as_number(np.uint8(code | sign))

    return float8_bits


_e4m3_bits, _e5m2_bits = _make_float8_bits(_E4M3, 3, 7), _make_float8_bits(_E5M2, 2, 15)


def _rounded(number: Any, like: Any) -> Any:
    """An fp32 number in the form of another one, which one of VIEWS shows."""
    raise NotImplementedError("Only compiled: see below.")


def _choose_rounding(number: Any, like: Any) -> Callable[[Any, Any], Any]:
    if like == types.uint16:
        return lambda number, like: narrowed(number)
    if like == types.int16:
        return lambda number, like: _half_bits(number)
    if like == _E4M3:
        return lambda number, like: _e4m3_bits(number)
    if like == _E5M2:
        return lambda number, like: _e5m2_bits(number)
    if like == types.int8:
        return lambda number, like: np.int8(np.int32(np.rint(number)))
    return lambda number, like: number


# Not strict: the annotations above would have to be those of the functions that are returned.
overload(_rounded, strict=False)(_choose_rounding)


@compiled
def widen(source: Array, target: Array) -> None:
    """source: of any of VIEWS; target: fp32."""
    for i in range(target.size):
        target[i] = widened(source[i])


@compiled
def widen_to_bf16(source: Array, target: Array) -> None:
    """source: of 8 bits, all of which bf16 has exactly."""
    for i in range(target.size):
        target[i] = np.uint16(np.float32(widened(source[i])).view(np.uint32) >> np.uint32(16))


@compiled
def narrow(source: Array, target: Array) -> None:
    """source: fp32; target: of any of VIEWS."""
    for i in range(source.size):
        target[i] = _rounded(source[i], target[i])


@compiled
def scale_row(source: Array, scale: Any, target: Array) -> None:
    """source: of any of VIEWS; target: source times the scale, in any of VIEWS."""
    for i in range(target.size):
        target[i] = _rounded(widened(source[i]) * scale, target[i])


@exact
def quantize(x: Array, numbers: Array, largest: Any, least: Any) -> Any:
    """x in 8 bits, and its scale: see `pagoda_kernels.kv_cache.quantize`, with the same bits."""
    # As integers, in whose order fp32 numbers above 0 are, and NaN after all of them.
    most_bits = np.float32(least).view(np.uint32)
    for i in range(x.size):
        most_bits = max(
            most_bits, np.uint32(np.float32(x[i]).view(np.uint32) & np.uint32(0x7FFFFFFF))
        )
    most = np.uint32(most_bits).view(np.float32)
    factor = np.float32(largest) / most
    for i in range(x.size):
        numbers[i] = _rounded(x[i] * factor, numbers[i])
    return most / np.float32(largest)
