"""The method of each format, and of a layer whose matrices are each in a format of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch

from pagoda_kernels.gated_activation import gated_activation
from pagoda_runtime.quantization.awq import AWQMethod
from pagoda_runtime.quantization.base import LinearMethod, Placement
from pagoda_runtime.quantization.compressed import PackedMethod
from pagoda_runtime.quantization.description import Quantization
from pagoda_runtime.quantization.exl2 import EXL2Method
from pagoda_runtime.quantization.gguf import GGUFMethod
from pagoda_runtime.quantization.gptq import GPTQMethod
from pagoda_runtime.quantization.parameter import JoinedParameter, Layout, Parameter
from pagoda_runtime.quantization.rounded import RoundedMethod
from pagoda_runtime.quantization.scaled import ScaledMethod
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
from pagoda_runtime.quantization.unquantized import UnquantizedLinear

MakeMethod = Callable[[Placement, str | None], LinearMethod]
_METHODS: Mapping[type[Scheme], Callable[..., LinearMethod]] = {
    AWQ: AWQMethod,
    GPTQ: GPTQMethod,
    PackedIntegers: PackedMethod,
    ScaledNumbers: ScaledMethod,
    EXL2: EXL2Method,
    GGUF: GGUFMethod,
    Rounded: RoundedMethod,
}


def get_linear_method(quantization: Quantization | None) -> MakeMethod:
    """The method of a checkpoint's matrices; of None: they are unquantized, and stay so."""
    return partial(ByModule, quantization=quantization) if quantization else UnquantizedLinear


def _make_method(
    scheme: Scheme | None, placement: Placement, activation: str | None
) -> LinearMethod:
    if scheme is None:
        return UnquantizedLinear(placement, activation)
    return _METHODS[type(scheme)](placement, activation, scheme=scheme)


class ByModule(LinearMethod):
    """Chooses the format of each part of a layer by the module's name.

    Neighbours in one format are one product; several products lie beside each other in the result.
    """

    def __init__(
        self,
        placement: Placement,
        activation: str | None = None,
        *,
        quantization: Quantization,
    ) -> None:
        super().__init__(placement, activation)
        self._quantization = quantization
        self.members: list[LinearMethod] = []

    def create_weights(self, layout: Layout, *, has_bias: bool) -> dict[str, Parameter]:
        def scheme_of(index: int) -> Scheme | None:
            return self._quantization.scheme_of(self.placement.module(layout.parts[index]))

        found: dict[str, list[Parameter]] = {}
        self._unfinished: list[tuple[LinearMethod, Mapping[str, Parameter]]] = []
        runs = [
            (scheme, [layout.parts[index] for index in indexes])
            for scheme, indexes in groupby(range(len(layout.parts)), scheme_of)
        ]
        for scheme, parts in runs:
            activation = self.activation if len(runs) == 1 else None
            method = _make_method(scheme, self.placement, activation)
            weights = method.create_weights(replace(layout, parts=parts), has_bias=has_bias)
            self.members.append(method)
            self._unfinished.append((method, weights))
            for name, parameter in weights.items():
                found.setdefault(name, []).append(parameter)
        return {
            name: several[0] if len(several) == 1 else JoinedParameter(several)
            for name, several in found.items()
        }

    def after_loading(self, weights: Mapping[str, Parameter]) -> None:
        while self._unfinished:
            member, own = self._unfinished.pop(0)
            member.after_loading(own)
            del own

    @property
    def num_bytes(self) -> int | None:
        sizes = [member.num_bytes for member in self.members]
        return sum(size or 0 for size in sizes) if None not in sizes else None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.members) == 1:
            return self.members[0].apply(x)
        y = torch.cat([member.apply(x) for member in self.members], 1)
        return y if self.activation is None else gated_activation(y, self.activation)
