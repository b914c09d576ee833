"""The formats of weights: a file for each, with one `LinearMethod`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pagoda_runtime.errors import FatalError

if TYPE_CHECKING:
    import torch

    from pagoda_runtime.quantization.base import LinearMethod


# Made when it is asked for: what only reads names must not load torch.
def _int8() -> type[LinearMethod]:
    from pagoda_runtime.quantization.int8 import Int8Linear

    return Int8Linear


ONLINE: Mapping[str, Callable[[], type[LinearMethod]]] = {"int8": _int8}
"""What the matrices of an unquantized checkpoint can be made when they are loaded."""


def get_linear_method(
    name: str | None, dtype: torch.dtype, device: torch.device
) -> type[LinearMethod]:
    """The method of a format; None: of an unquantized checkpoint that is to stay so.

    Raises: FatalError: QuantizationMismatch if the format does not go with dtype or device.
    """
    if name is None:
        from pagoda_runtime.quantization.unquantized import UnquantizedLinear

        return UnquantizedLinear
    method = ONLINE[name]()
    if need := method.unmet_need(dtype, device):
        raise FatalError(
            "QuantizationMismatch",
            f"--quantization {name} (engine.quantization) needs {need}; this is {device.type} in "
            f"{str(dtype).removeprefix('torch.')}. Remove the flag.",
        )
    return method
