"""The formats of weights: a file for each, with one `LinearMethod`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pagoda_runtime.quantization.description import Quantization
from pagoda_runtime.quantization.schemes import (
    AWQ,
    EXL2,
    GGUF,
    GPTQ,
    PackedIntegers,
    Rounded,
    ScaledNumbers,
    Scheme,
)

if TYPE_CHECKING:
    from pagoda_runtime.quantization.by_module import MakeMethod


def get_linear_method(quantization: Quantization | None) -> MakeMethod:
    """The method of a checkpoint's matrices; of None: they are unquantized, and stay so."""
    # Not above: what only reads configs must not load torch.
    from pagoda_runtime.quantization.by_module import ByModule

    if quantization is None:
        return _method_of(None)
    return partial(ByModule, quantization=quantization, make=_method_of)


def _method_of(scheme: Scheme | None) -> MakeMethod:
    """The row of a format, to be made with a placement and an activation."""
    match scheme:
        case None:
            from pagoda_runtime.quantization.unquantized import UnquantizedLinear

            return UnquantizedLinear
        case AWQ():
            from pagoda_runtime.quantization.awq import AWQMethod

            return partial(AWQMethod, scheme=scheme)
        case GPTQ():
            from pagoda_runtime.quantization.gptq import GPTQMethod

            return partial(GPTQMethod, scheme=scheme)
        case PackedIntegers():
            from pagoda_runtime.quantization.compressed import PackedMethod

            return partial(PackedMethod, scheme=scheme)
        case ScaledNumbers():
            from pagoda_runtime.quantization.scaled import ScaledMethod

            return partial(ScaledMethod, scheme=scheme)
        case EXL2():
            from pagoda_runtime.quantization.exl2 import EXL2Method

            return EXL2Method
        case GGUF():
            from pagoda_runtime.quantization.gguf import GGUFMethod

            return partial(GGUFMethod, scheme=scheme)
        case Rounded():
            from pagoda_runtime.quantization.rounded import RoundedMethod

            return partial(RoundedMethod, scheme=scheme)
