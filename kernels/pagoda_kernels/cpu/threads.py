"""Run a compiled kernel on the threads that torch has already.

A second pool of threads would fight torch's for the cores. torch's OpenMP can run any function on
its threads, and they are still awake from the product before: a call costs a few microseconds.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import sigutils
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from pagoda_kernels.cpu.cache import KernelCache
from pagoda_kernels.cpu.compiled import KERNELS, OPTIONS, Compiled, compiled

Task = Any
"""What a kernel gets: a C array of int64, the number of claimed parts and then its arguments."""


class ThreadedKernel:
    """A function of a task, compiled at its first call.

    Every thread calls it once, and it claims parts of the work until none is left; so a thread
    that the machine takes away for a while delays the others by one part at most.
    """

    def __init__(
        self, function: Callable[[Task], None], needs: frozenset[str] = frozenset()
    ) -> None:
        """needs: features of the processor, as LLVM names them."""
        self._function = function
        self._compiled: Any = None
        KERNELS.append(Compiled(function.__qualname__, needs, self.prepare))

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def prepare(self) -> None:
        """Compile it, or find it in a file."""
        signature = types.void(types.CPointer(types.int64))
        kernel: Any = CFunc(self._function, sigutils.normalize_signature(signature), {}, OPTIONS)
        kernel._cache = KernelCache(self._function)
        kernel.compile()
        self._compiled = kernel

    def __call__(self, *arguments: int) -> None:
        """Args: addresses and numbers; in the task they follow the number of claimed parts."""
        if self._compiled is None:
            self.prepare()
        task = (ctypes.c_int64 * (len(arguments) + 1))(0, *arguments)
        parallel = _openmp_parallel()
        if parallel is None:
            self._compiled.ctypes(task)
        else:
            parallel(ctypes.c_void_p(self._compiled.address), task, torch.get_num_threads(), 0)


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


def bits_of(number: float) -> int:
    """A float, as an argument of a kernel; inside it, `float_of` gives it back."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


@compiled
def float_of(bits: int) -> Any:
    return np.int64(bits).view(np.float64)
