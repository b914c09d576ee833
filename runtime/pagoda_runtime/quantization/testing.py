"""Random matrices in the formats of quantized checkpoints, written number by number.

Written from the descriptions of the formats, with nothing of what reads them here: each function
returns the tensors of a checkpoint, and the matrix that they stand for.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output of a word that each of its eight fields has, the lowest first."""


class Written(NamedTuple):
    """A matrix, and what a checkpoint has of it."""

    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor
    """[outputs, inputs] fp64"""


def stream(numbers: Sequence[int], bits: int) -> list[int]:
    """Numbers as a stream of bits in words of 32, the lowest first; each as an int32 has it."""
    whole = 0
    for number in reversed(numbers):
        whole = whole << bits | number
    num_words = -(-len(numbers) * bits // 32)
    return list(struct.unpack(f"<{num_words}i", whole.to_bytes(4 * num_words, "little")))


def streams(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, words] int32 of [rows, n]."""
    return torch.tensor([stream(row, bits) for row in numbers.tolist()], dtype=torch.int32)


def _draw(outputs: int, inputs: int, num_groups: int, bits: int) -> tuple[torch.Tensor, ...]:
    """Integers [outputs, inputs], and zeros and scales [outputs, groups]."""
    integers = torch.randint(0, 2**bits, (outputs, inputs))
    # GPTQ's first version stores zeros less one.
    zeros = torch.randint(1, 2**bits, (outputs, num_groups))
    scales = (torch.rand(outputs, num_groups) + 0.5) * 0.6 / 2**bits
    return integers, zeros, scales.half()


def _dequantize(
    integers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    return (integers - zeros[:, groups]).double() * scales.double()[:, groups]


def write_awq(outputs: int, inputs: int, group_size: int) -> Written:
    num_groups = inputs // group_size
    integers, zeros, scales = _draw(outputs, inputs, num_groups, 4)

    def pack(numbers: torch.Tensor) -> torch.Tensor:
        """[n, outputs / 8] of [n, outputs]."""
        fields = [8 * (i // 8) + AWQ_ORDER[i % 8] for i in range(outputs)]
        return streams(numbers[:, fields], 4)

    groups = torch.arange(inputs) // group_size
    tensors = {
        "qweight": pack(integers.T),
        "qzeros": pack(zeros.T),
        "scales": scales.T.contiguous(),
    }
    return Written(tensors, _dequantize(integers, zeros, scales, groups))


def write_gptq(
    outputs: int,
    inputs: int,
    group_size: int,
    bits: int = 4,
    *,
    is_v2: bool = False,
    is_symmetric: bool = False,
    groups: torch.Tensor | None = None,
) -> Written:
    """groups: that of each input, in any order; None: one after the other, as without desc_act."""
    size = inputs if group_size < 0 else group_size
    integers, zeros, scales = _draw(outputs, inputs, inputs // size, bits)
    if is_symmetric:
        zeros.fill_(2 ** (bits - 1))
    if groups is None:
        groups = torch.arange(inputs) // size
    tensors = {
        "qweight": streams(integers, bits).T.contiguous(),
        "qzeros": streams((zeros if is_v2 else zeros - 1).T, bits),
        "scales": scales.T.contiguous(),
        "g_idx": groups.int(),
    }
    return Written(tensors, _dequantize(integers, zeros, scales, groups))


def write_packed(
    outputs: int,
    inputs: int,
    group_size: int,
    bits: int = 4,
    *,
    is_symmetric: bool = True,
    groups: torch.Tensor | None = None,
) -> Written:
    """compressed-tensors' pack-quantized; of a group_size of -1 a scale for each output."""
    size = inputs if group_size < 0 else group_size
    integers, zeros, scales = _draw(outputs, inputs, inputs // size, bits)
    if is_symmetric:
        zeros.fill_(2 ** (bits - 1))
    tensors = {
        "weight_packed": streams(integers, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if not is_symmetric:
        tensors["weight_zero_point"] = streams(zeros.T, bits).T.contiguous()
    if groups is not None:
        tensors["weight_g_idx"] = groups.int()
    else:
        groups = torch.arange(inputs) // size
    return Written(tensors, _dequantize(integers, zeros, scales, groups))


def write_scaled(
    outputs: int,
    inputs: int,
    *,
    numbers: str = "e4m3",
    scales_of: str = "tensor",
    scale_name: str = "weight_scale",
) -> Written:
    """scales_of: tensor, channel, or block: of 128 outputs and 128 inputs."""
    if numbers == "e4m3":
        weight = (torch.randn(outputs, inputs) * 50).to(torch.float8_e4m3fn)
    else:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    shape = {
        "tensor": (),
        "channel": (outputs, 1),
        "block": (-(-outputs // 128), -(-inputs // 128)),
    }[scales_of]
    scales = (torch.rand(shape) + 0.5) * 0.004
    wide = scales.double()
    if scales_of == "block":
        wide = wide[torch.arange(outputs) // 128][:, torch.arange(inputs) // 128]
    return Written({"weight": weight, scale_name: scales}, weight.double() * wide)


def write_exl2(outputs: int, inputs: int, groups: Sequence[tuple[int, int]]) -> Written:
    """groups: the bits and the inputs of each."""
    assert sum(size for _, size in groups) == inputs
    padded = -(-outputs // 32) * 32
    order = torch.randperm(inputs)
    words: list[torch.Tensor] = []
    starts: list[int] = []
    rows: list[torch.Tensor] = []
    indexes = torch.randint(0, 16, (len(groups), padded))
    largest = (torch.rand(len(groups)) + 0.5).half()
    for number, (bits, size) in enumerate(groups):
        integers = torch.randint(0, 2**bits, (padded, size))
        # As large as others, however many bits they have.
        largest[number] *= 0.6 / 2**bits
        starts += [bits, sum(len(some) for some in words)]
        words.append(streams(integers, bits).T)
        scales = (indexes[number] + 1).double() ** 2 * largest[number].double() / 256
        rows.append(((integers - 2 ** (bits - 1)).double() * scales[:, None]).T)
    weight = torch.empty(inputs, padded, dtype=torch.float64)
    weight[order] = torch.cat(rows)
    tensors = {
        "q_weight": torch.cat(words).contiguous(),
        "q_groups": torch.tensor(starts, dtype=torch.int16),
        "q_scale": streams(indexes, 4),
        "q_scale_max": largest,
        "q_invperm": order.argsort().int(),
    }
    return Written(tensors, weight.T[:outputs].contiguous())
