"""What a format of weights is to a linear layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import pad

from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.quantization.parameter import Dim, Layout, Parameter, Part

Product = Callable[[torch.Tensor], torch.Tensor]
"""[num_rows, out_features] of x, [num_rows, in_features]."""


class LinearMethod(ABC):
    """The matrix of one linear layer in some format: its tensors, and the product with it.

    Args:
        activation: a name of ACTIVATIONS if the layer stacks two parts of one size, gate and up,
            and the result is activation(gate) * up.
    """

    def __init__(self, placement: Placement, activation: str | None = None) -> None:
        self.placement, self.activation = placement, activation

    @abstractmethod
    def create_weights(self, layout: Layout, *, has_bias: bool) -> dict[str, Parameter]:
        """The tensors that a checkpoint has for each matrix, by name, each with its dimensions."""

    @abstractmethod
    def after_loading(self, weights: Mapping[str, Parameter]) -> None:
        """Bring the weights into the form that `apply` takes; they are dropped afterwards."""

    def use(self, product: Product, *, are_rows_alike: bool) -> None:
        """Let `apply` be this product.

        are_rows_alike: a row's bits never depend on the other rows, so these need not be fixed.
        """
        is_fixed = self.placement.is_deterministic and not are_rows_alike
        self.product = fix_rows(product) if is_fixed else product

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, out_features] of x, [num_tokens, in_features]; if the placement says so, a
        row's bits do not depend on the other rows.
        """
        return self.product(x)

    @property
    def num_bytes(self) -> int | None:
        """Of the weights as `apply` reads them; None: as they were loaded."""
        return None


@dataclass(frozen=True, slots=True)
class Placement:
    """How and where layers hold their tensors: the format, the dtype, the device and the rank.

    is_deterministic: let the bits of a token's result not depend on a step's other tokens; slower.
    path: the module whose layers these are; stored_name: what the checkpoint calls one.
    """

    dtype: torch.dtype
    device: torch.device
    method: Callable[[Placement, str | None], LinearMethod]
    parallel: TensorParallel = field(default_factory=TensorParallel)
    is_deterministic: bool = False
    path: str = ""
    stored_name: Callable[[str], str] = str

    def at(self, name: str) -> Placement:
        """That of a module within this one."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    def module(self, part: Part) -> str:
        """What the checkpoint calls a part of a layer that lies here."""
        return self.stored_name(f"{self.path}.{part.name}" if part.name else self.path)

    def parameter(self, layout: Layout, *dims: Dim) -> Parameter:
        """In the model's dtype."""
        return Parameter(layout, dims, dtype=self.dtype, device=self.device, parallel=self.parallel)


def fix_rows(product: Product) -> Product:
    """A product that is always called with the same number of rows.

    How a product sums may depend on its number of rows; so the bits of a row's result would depend
    on its neighbours. With one number of rows they do not.
    """

    def multiply(x: torch.Tensor) -> torch.Tensor:
        missing = -len(x) % _FIXED_ROWS
        tiles = (pad(x, (0, 0, 0, missing)) if missing else x).split(_FIXED_ROWS)
        results = [product(tile) for tile in tiles]
        return torch.cat(results)[: len(x)] if len(results) > 1 else results[0][: len(x)]

    return multiply


_FIXED_ROWS = 16
