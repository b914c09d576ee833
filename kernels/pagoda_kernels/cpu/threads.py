"""Run a compiled kernel on the threads that torch has already.

A second pool of threads would fight torch's for the cores. torch's OpenMP can run any function on
its threads, and they are still awake from the product before: a call costs a few microseconds.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, get_type_hints

import torch
from llvmlite import ir
from numba import types
from numba.core import sigutils
from numba.core.ccallback import CFunc
from numba.extending import intrinsic
from torch import Tensor

from pagoda_kernels.cpu.cache import KernelCache
from pagoda_kernels.cpu.compiled import KERNELS, OPTIONS

Task = Any
"""What a kernel gets: a C array of int64, the number of claimed parts and then its arguments."""

Fields = TypeVar("Fields", bound=NamedTuple)

_KINDS = {int: types.int64, float: types.float64}


class ThreadedKernel:
    """A function of a task, compiled at its first call.

    Every thread calls it once, and it claims parts of the work until none is left; so a thread
    that the machine takes away for a while delays the others by one part at most.
    """

    def __init__(
        self,
        function: Callable[[Task], None],
        needs: frozenset[str] = frozenset(),
        variant: str = "",
        is_ahead: bool = True,
    ) -> None:
        """
        Args:
            needs: features of the processor, as LLVM names them.
            variant, is_ahead: see `pagoda_kernels.cpu.compiled.Kernel`.
        """
        self._function, self._cache = function, KernelCache(function, variant)
        self._compiled: Any = None
        if is_ahead:
            KERNELS.append((needs, self.prepare))

    def prepare(self) -> None:
        """Compile it, or find it in a file."""
        signature = types.void(types.CPointer(types.int64))
        kernel: Any = CFunc(self._function, sigutils.normalize_signature(signature), {}, OPTIONS)
        kernel._cache = self._cache
        kernel.compile()
        self._compiled = kernel

    def __call__(self, *arguments: int | float | Tensor) -> None:
        """Args: in the task they follow the number of claimed parts, tensors as addresses."""
        if self._compiled is None:
            self.prepare()
        # By the very type: asking torch for an instance takes longer than the rest of this.
        words = [
            a if type(a) is int else a.data_ptr() if type(a) is Tensor else _bits_of(cast(float, a))
            for a in arguments
        ]
        task = (ctypes.c_int64 * (len(words) + 1))(0, *words)
        parallel = _openmp_parallel()
        if parallel is None:
            self._compiled.ctypes(task)
        else:
            parallel(ctypes.c_void_p(self._compiled.address), task, torch.get_num_threads(), 0)


def _bits_of(number: float) -> int:
    return int.from_bytes(struct.pack("d", number), sys.byteorder, signed=True)


@cache
def _openmp_parallel() -> Any:
    """GNU OpenMP's GOMP_parallel, out of the library that torch uses; None if it uses another."""
    folder = Path(torch.__file__).parent / "lib"
    for name in (*sorted(map(str, folder.glob("libgomp*.so*"))), "libgomp.so.1"):
        try:
            return ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
    return None


def _make_claim(_context: Any, task: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], ir.IntType(64)(1), "monotonic")

    return types.int64(task), generate


claim: Any = intrinsic(_make_claim)
"""Inside a kernel, of its task: the next part that no thread has had."""


def make_reader(fields: type[Fields]) -> Callable[[Any], Fields]:
    """A function for kernels: a NamedTuple of int and float, out of 8 bytes for each field.

    They are a task's arguments, or are at an address.
    """
    kinds = [_KINDS[kind] for kind in get_type_hints(fields).values()]
    result = types.NamedTuple(kinds, fields)

    def read(_context: Any, source: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer, first = arguments[0], 1
            if not isinstance(source, types.CPointer):
                pointer, first = builder.inttoptr(pointer, ir.IntType(64).as_pointer()), 0
            values = []
            for i, kind in enumerate(kinds, first):
                bits = builder.load(builder.gep(pointer, [ir.IntType(64)(i)]))
                values.append(builder.bitcast(bits, context.get_value_type(kind)))
            return context.make_tuple(builder, signature.return_type, values)

        return result(source), generate

    return cast(Callable[[Any], Fields], intrinsic(read))
