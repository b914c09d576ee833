"""The pieces of kernels that numba compiles for the CPU they run on.

torch takes 2 to 10 us for each operation of a decode step, whatever its size, and a layer has about
50 of them. A loop in Python, compiled, does the work of ten in one call of 1 us.

Such kernels run on one thread, for work of some 100 us at most: waking a second one costs more.
Larger ones are in `pagoda_kernels.cpu.threads`. They take addresses, because wrapping a tensor as
an array takes longer than many of them run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

# Before anything is compiled.
import pagoda_kernels.cpu.targets  # noqa: F401
from pagoda_kernels.cpu.cache import KernelCache

Array: TypeAlias = Any
"""An array of numbers inside a kernel, or a part of one."""

Function = TypeVar("Function", bound=Callable[..., Any])

# Sums may be split among the lanes of a vector. NaN and infinity keep their meaning.
_FAST_MATH = {"reassoc", "contract", "arcp", "nsz"}
# A division by zero gives infinity. That it raises an error would keep it out of vectors.
OPTIONS: dict[str, Any] = {"fastmath": _FAST_MATH, "error_model": "numpy"}


_TYPES = {"int": types.int64, "float": types.float64, "bool": types.boolean}


KERNELS: list[tuple[frozenset[str], Callable[[], None]]] = []
"""Of each kernel that was imported and is to be compiled ahead the features of the processor that
it needs, as LLVM names them, and what compiles it before it is called, or finds it in a file."""

# Nobody calls the parts of kernels from Python.
_PART: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def compiled(function: Function) -> Function:
    """A part of kernels: compiled as often as they are."""
    return cast(Function, njit(**_PART, **OPTIONS)(function))


def exact(function: Function) -> Function:
    """A part of kernels whose every operation is rounded as it is written."""
    return cast(Function, njit(**_PART, **(OPTIONS | {"fastmath": False}))(function))


class Kernel:
    """A function of int, float and bool, compiled at its first call and kept in a file.

    Where it takes an address a tensor can be given.
    """

    def __init__(
        self, function: Callable[..., object], variant: str = "", is_ahead: bool = True
    ) -> None:
        """
        Args:
            variant: tells functions of the same name apart, which close over different things.
            is_ahead: whether it is compiled ahead: see `pagoda_kernels.cpu.ahead`.
        """
        self.dispatcher = njit(nogil=True, **OPTIONS)(cast(Any, function))
        self.dispatcher._cache = KernelCache(function, variant)
        # By the names of the types: annotations are strings here.
        self._signature = tuple(
            _TYPES[name] for key, name in function.__annotations__.items() if key != "return"
        )
        if is_ahead:
            KERNELS.append((frozenset(), self.prepare))

    def prepare(self) -> None:
        """Compile it, or find it in a file."""
        self.dispatcher.compile(self._signature)

    def __call__(self, *arguments: int | float | bool | Tensor) -> object:
        return self.dispatcher(*[a.data_ptr() if type(a) is Tensor else a for a in arguments])


def emitted(result: Any = types.void) -> Callable[[Callable[..., Any]], Any]:
    """Decorates what emits instructions, to be called inside kernels.

    emit(builder, *arguments) gets llvmlite's builder and int64 values; the result is of this type.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        # With the names of its arguments: numba asks for as many.
        @functools.wraps(emit)
        def typed(_context: Any, *kinds: Any) -> Any:
            def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
                value = emit(builder, *arguments)
                return context.get_dummy_value() if result == types.void else value

            return result(*[types.int64] * len(kinds)), generate

        return intrinsic(typed)

    return decorate


def emit_prefetch(b: Any, address: Any, locality: int) -> None:
    """Ask for the 64 bytes at an address, to be read soon; locality 3: into all levels of cache."""
    byte_pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte_pointer, int32, int32, int32])
    function = b.module.declare_intrinsic("llvm.prefetch", [byte_pointer], kind)
    # To be read, as data.
    arguments = int32(0), int32(locality), int32(1)
    b.call(function, [b.inttoptr(address, byte_pointer), *arguments])


@emitted()
def _prefetch(b: Any, address: Any) -> None:
    emit_prefetch(b, address, 3)


def _make_row_pointer(_context: Any, address: Any, matrix: Any) -> Any:
    pointer = types.CPointer(matrix.dtype)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, matrix), generate


_row_pointer: Any = intrinsic(_make_row_pointer)
"""An address as a pointer to numbers like those of a matrix."""


@compiled
def address_of(numbers: Array) -> Any:
    """Signed, like the addresses of a task: a variable that may be either would become a float."""
    return np.int64(numbers.ctypes.data)


@compiled
def row_of(matrix: Array, index: int) -> Array:
    """matrix[index], whose memory is not the kernel's own: no reference to it is counted."""
    num_columns = matrix.shape[1]
    at = address_of(matrix) + index * num_columns * matrix.itemsize
    return carray(_row_pointer(at, matrix), (num_columns,))


@compiled
def prefetch(address: int, num_bytes: int) -> None:
    for offset in range(0, num_bytes, 64):
        _prefetch(address + offset)


LOG2_E = np.float32(1.4426950408889634)
# Taylor's series of exp(x * ln 2), highest power first, for x in [-1/2, 1/2].
_EXP2 = tuple(
    np.float32(c)
    for c in (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1)
)


@compiled
def exp2(power: Any) -> Any:
    """2 ** power of an fp32 number up to 126, in operations that vectors have; 0 below -127.

    Within 3 units of the last place.
    """
    power = max(power, np.float32(-127))
    whole = np.rint(power)
    part = power - whole
    series = _EXP2[0]
    series = series * part + _EXP2[1]
    series = series * part + _EXP2[2]
    series = series * part + _EXP2[3]
    series = series * part + _EXP2[4]
    series = series * part + _EXP2[5]
    series = series * part + np.float32(1)
    return series * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def fill(numbers: Array, number: Any) -> None:
    for i in range(numbers.size):
        numbers[i] = number


@compiled
def copy(source: Array, target: Array) -> None:
    """As a loop: what a slice is assigned is checked, and compiling that takes two seconds."""
    for i in range(source.size):
        target[i] = source[i]


@compiled
def sum_of_squares(x: Array) -> Any:
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * x[i]
    return total
