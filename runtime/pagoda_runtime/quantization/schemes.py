"""How a matrix of a checkpoint is stored, as its config file tells it; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

WHOLE_ROW = -1
"""A size of groups: a scale for all inputs."""
FP8_BLOCK_SIZE = 128
"""Outputs and inputs of a block."""
GGUFType = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
GGUF_TYPES: tuple[GGUFType, ...] = get_args(GGUFType)
"""Those whose blocks are kept; matrices in others are dequantized when a file is converted."""


@dataclass(frozen=True, slots=True)
class AWQ:
    """4 bits and zeros, eight outputs to a word."""

    group_size: int


@dataclass(frozen=True, slots=True)
class GPTQ:
    """2, 3, 4 or 8 bits and zeros, inputs side by side in words.

    desc_act: the groups are of inputs that lie anywhere: `g_idx` says where.
    is_v2: zeros are stored as they are, and not less one.
    """

    bits: int
    group_size: int
    desc_act: bool = False
    is_v2: bool = False


@dataclass(frozen=True, slots=True)
class PackedIntegers:
    """compressed-tensors' pack-quantized: 4 or 8 bits, inputs side by side in words.

    is_ordered: `weight_g_idx` says which inputs a group has.
    """

    bits: int
    group_size: int
    is_symmetric: bool = True
    is_ordered: bool = False


@dataclass(frozen=True, slots=True)
class ScaledNumbers:
    """8 bits each; a scale for the matrix, for each output, or for blocks of outputs and inputs.

    activations: what x is rounded to the same numbers by, where the device multiplies them: not at
        all, a scale in the checkpoint, or one for each row that is found as it comes.
    """

    numbers: Literal["e4m3", "int8"]
    block_size: int = 0
    activations: Literal["none", "static", "dynamic"] = "dynamic"


@dataclass(frozen=True, slots=True)
class EXL2:
    """2 to 8 bits, for each group of inputs others."""


@dataclass(frozen=True, slots=True)
class GGUF:
    """Blocks of 32 or 256 inputs, each with scales of its own."""

    type: GGUFType


@dataclass(frozen=True, slots=True)
class Rounded:
    """An unquantized matrix that is rounded as it is loaded."""

    name: Literal["fp8", "int8", "int4"]


Scheme = AWQ | GPTQ | PackedIntegers | ScaledNumbers | EXL2 | GGUF | Rounded
