"""A layer whose matrices the checkpoint has in one format, or each in its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby

import torch

from pagoda_kernels.gated_activation import gated_activation
from pagoda_runtime.quantization.base import LinearMethod, Placement
from pagoda_runtime.quantization.description import Quantization
from pagoda_runtime.quantization.parameter import JoinedParameter, Layout, Parameter
from pagoda_runtime.quantization.schemes import Scheme

MakeMethod = Callable[[Placement, str | None], LinearMethod]


class ByModule(LinearMethod):
    """Chooses the format of each part of a layer by the module's name.

    Neighbours in one format are one product; several products lie beside each other in the result.

    Args:
        make: the method of a format; of None, that of what is not quantized.
    """

    def __init__(
        self,
        placement: Placement,
        activation: str | None = None,
        *,
        quantization: Quantization,
        make: Callable[[Scheme | None], MakeMethod],
    ) -> None:
        super().__init__(placement, activation)
        self._quantization, self._make = quantization, make
        self.members: list[LinearMethod] = []

    def create_weights(self, layout: Layout, *, has_bias: bool) -> dict[str, Parameter]:
        def scheme_of(index: int) -> Scheme | None:
            return self._quantization.scheme_of(self.placement.module(layout.parts[index]))

        found: dict[str, list[Parameter]] = {}
        self._weights: list[Mapping[str, Parameter]] = []
        runs = [
            (scheme, [layout.parts[index] for index in indexes])
            for scheme, indexes in groupby(range(len(layout.parts)), scheme_of)
        ]
        for scheme, parts in runs:
            activation = self.activation if len(runs) == 1 else None
            method = self._make(scheme)(self.placement, activation)
            weights = method.create_weights(replace(layout, parts=parts), has_bias=has_bias)
            self.members.append(method)
            self._weights.append(weights)
            for name, parameter in weights.items():
                found.setdefault(name, []).append(parameter)
        return {
            name: several[0] if len(several) == 1 else JoinedParameter(several)
            for name, several in found.items()
        }

    def after_loading(self, weights: Mapping[str, Parameter]) -> None:
        while self._weights:
            self.members[-len(self._weights)].after_loading(self._weights.pop(0))

    @property
    def num_bytes(self) -> int | None:
        sizes = [member.num_bytes for member in self.members]
        return sum(size or 0 for size in sizes) if None not in sizes else None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.members) == 1:
            return self.members[0].apply(x)
        y = torch.cat([member.apply(x) for member in self.members], 1)
        return y if self.activation is None else gated_activation(y, self.activation)
