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


def write_gguf(outputs: int, inputs: int, kind: str) -> Written:
    """Blocks of one of GGUF's types. Some groups of numbers have no scale, but a least number."""
    size = 256 if kind.endswith("_K") else 32
    num_blocks = outputs * (inputs // size)
    if kind == "Q6_K":
        stored, weight = _gguf_q6_k(num_blocks)
    elif size == 256:
        stored, weight = _gguf_k(num_blocks, has_fifth=kind == "Q5_K")
    elif kind == "Q8_0":
        numbers, scales = torch.randint(-128, 128, (num_blocks, 32)), _gguf_scales(num_blocks, 8)
        stored = torch.cat([_as_bytes(scales), numbers.to(torch.int8).view(torch.uint8)], 1)
        weight = numbers * scales.double()
    else:
        stored, weight = _gguf_small(num_blocks, bits=int(kind[1]), has_least=kind[-1] == "1")
    return Written({"qweight": stored.view(outputs, -1)}, weight.view(outputs, inputs))


def _gguf_scales(num_blocks: int, bits: int) -> torch.Tensor:
    return ((torch.rand(num_blocks, 1) + 0.5) * 0.6 / 2**bits).half()


def _as_bytes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.contiguous().view(torch.uint8)


def _gguf_small(num_blocks: int, *, bits: int, has_least: bool) -> tuple[torch.Tensor, ...]:
    numbers, scales = torch.randint(0, 2**bits, (num_blocks, 32)), _gguf_scales(num_blocks, bits)
    heads, weight = [_as_bytes(scales)], (numbers - 2 ** (bits - 1)) * scales.double()
    if has_least:
        scales[0] = 0
        least = torch.randn(num_blocks, 1).half() * 0.2
        heads = [_as_bytes(scales), _as_bytes(least)]
        weight = numbers * scales.double() + least.double()
    fifths = torch.zeros(num_blocks, 4, dtype=torch.int64)
    others = torch.zeros(num_blocks, 16, dtype=torch.int64)
    for i in range(32):
        fifths[:, i // 8] |= (numbers[:, i] >> 4) << i % 8
        others[:, i % 16] |= (numbers[:, i] & 15) << i // 16 * 4
    if bits == 5:
        heads.append(fifths.to(torch.uint8))
    return torch.cat([*heads, others.to(torch.uint8)], 1), weight


def _gguf_k(num_blocks: int, *, has_fifth: bool) -> tuple[torch.Tensor, ...]:
    bits = 5 if has_fifth else 4
    numbers = torch.randint(0, 2**bits, (num_blocks, 256))
    scales, least = torch.randint(0, 64, (2, num_blocks, 8))
    scales[:, 0] = 0
    factors = [_gguf_scales(num_blocks, bits + 5), _gguf_scales(num_blocks, 6)]
    sixes = torch.zeros(num_blocks, 12, dtype=torch.int64)
    for group in range(4):
        sixes[:, group] = scales[:, group] | scales[:, group + 4] >> 4 << 6
        sixes[:, group + 4] = least[:, group] | least[:, group + 4] >> 4 << 6
        sixes[:, group + 8] = scales[:, group + 4] & 15 | (least[:, group + 4] & 15) << 4
    fifths = torch.zeros(num_blocks, 32, dtype=torch.int64)
    others = torch.zeros(num_blocks, 128, dtype=torch.int64)
    for i in range(256):
        fifths[:, i % 32] |= (numbers[:, i] >> 4) << i // 32
        others[:, i // 64 * 32 + i % 32] |= (numbers[:, i] & 15) << i // 32 % 2 * 4
    parts = [sixes, fifths, others] if has_fifth else [sixes, others]
    stored = [*map(_as_bytes, factors), *(part.to(torch.uint8) for part in parts)]
    wide = (factors[0].double() * scales).repeat_interleave(32, 1)
    return torch.cat(stored, 1), numbers * wide - (factors[1].double() * least).repeat_interleave(
        32, 1
    )


def _gguf_q6_k(num_blocks: int) -> tuple[torch.Tensor, ...]:
    numbers = torch.randint(0, 64, (num_blocks, 256))
    scales, factor = torch.randint(-128, 128, (num_blocks, 16)), _gguf_scales(num_blocks, 12)
    others = torch.zeros(num_blocks, 128, dtype=torch.int64)
    uppers = torch.zeros(num_blocks, 64, dtype=torch.int64)
    for i in range(256):
        half, place = divmod(i, 128)
        others[:, half * 64 + place % 64] |= (numbers[:, i] & 15) << place // 64 * 4
        uppers[:, half * 32 + place % 32] |= (numbers[:, i] >> 4) << place // 32 * 2
    parts = [part.to(torch.uint8) for part in (others, uppers)]
    stored = [*parts, _as_bytes(scales.to(torch.int8)), _as_bytes(factor)]
    wide = (factor.double() * scales).repeat_interleave(16, 1)
    return torch.cat(stored, 1), (numbers - 32) * wide
