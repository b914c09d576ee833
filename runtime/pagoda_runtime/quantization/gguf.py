"""GGUF's blocks: 32 or 256 inputs of an output in 4 to 8 bits, beside their scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from pagoda_kernels.grouped_linear import Grouped
from pagoda_runtime.quantization.grouped import GroupedMethod, Segment
from pagoda_runtime.quantization.order import order_of_runs
from pagoda_runtime.quantization.parameter import OUTPUT, Axis, Dim, Layout, StoredParameter
from pagoda_runtime.quantization.schemes import GGUF, GGUFType
from pagoda_runtime.quantization.stored import Matrix

_MOST_STEPS = 2.0**15
"""Above zero a group's numbers may begin: products hold zeros in fp16."""


class _Numbers(NamedTuple):
    """weight = integers * scales - least"""

    integers: torch.Tensor
    """[blocks, inputs] uint8."""
    scales: torch.Tensor
    """[blocks, groups] fp32."""
    least: torch.Tensor | None
    """The same shape; None: 2 ** (bits - 1) * scales."""


class _Block(NamedTuple):
    inputs: int
    num_bytes: int
    bits: int
    group_size: int
    unpack: Callable[[torch.Tensor], _Numbers]
    """Of [blocks, num_bytes] uint8."""
    is_symmetric: bool = True


class GGUFMethod(GroupedMethod[GGUF]):
    """qweight [outputs, bytes]: blocks of inputs, one after the other."""

    def tensors(self, layout: Layout) -> dict[str, StoredParameter]:
        block = self._block = _BLOCKS[self._scheme.type]
        inputs = Dim(Axis.INPUT, block.inputs, block.num_bytes)
        return {"qweight": self.stored(layout, OUTPUT, inputs, dtypes=(torch.uint8,))}

    def segments(self, matrix: Matrix) -> list[Segment]:
        block, inputs = self._block, matrix.inputs
        order = order_of_runs(inputs, block.group_size, self.placement.device)
        offset = inputs.start % block.inputs
        groups = order.group_of - (inputs.start - offset) // block.group_size

        def read(rows: slice) -> Grouped:
            stored = matrix["qweight"][rows]
            found = block.unpack(stored.reshape(-1, block.num_bytes))
            integers = found.integers.view(len(stored), -1)[:, offset : offset + len(inputs)]
            for numbers in (found.scales, found.least):
                if numbers is not None:
                    matrix.require_finite("qweight", numbers)
            scales = found.scales.view(len(stored), -1)[:, groups]
            grouped = Grouped(order.arrange(integers).contiguous(), scales, None)
            if found.least is not None:
                return _with_zeros(grouped, found.least.view(len(stored), -1)[:, groups])
            return grouped

        return [Segment(block.bits, order, block.is_symmetric, read)]


def _with_zeros(rows: Grouped, least: torch.Tensor) -> Grouped:
    """weight = (integers - zeros) * scales, of integers * scales - least.

    A group whose scale is zero, or so small beside `least` that its numbers hardly count, becomes
    zeros minus one, times `least`.
    """
    is_flat = least.abs() > _MOST_STEPS * rows.scales.abs()
    groups = rows.integers.unflatten(1, (is_flat.shape[1], -1))
    return Grouped(
        groups.masked_fill(is_flat[..., None], 0).flatten(1),
        torch.where(is_flat, least, rows.scales),
        torch.where(is_flat, 1.0, least / torch.where(rows.scales == 0, 1.0, rows.scales)),
    )


def _halves(blocks: torch.Tensor, first: int, count: int = 1) -> torch.Tensor:
    """[blocks, count] fp32 of fp16 that begin at a byte."""
    return blocks[:, first : first + 2 * count].contiguous().view(torch.float16).float()


def _nibbles(stored: torch.Tensor, size: int) -> torch.Tensor:
    """[blocks, 2 * bytes]: of each run of `size` bytes first the lower halves, then the upper."""
    runs = stored.unflatten(1, (-1, size))
    return torch.stack([runs & 15, runs >> 4], 2).flatten(1)


def _upper_bits(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """[blocks, runs, 8 / bits, bytes] of [blocks, runs, bytes]: first all bytes' lowest bits."""
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=stored.device)
    return ((stored[:, :, None] >> places[:, None]) & (2**bits - 1)) << 4


def _unpack_small(blocks: torch.Tensor, *, has_least: bool, has_fifth: bool) -> _Numbers:
    """Of 32 numbers in 4 or 5 bits: scale, least, the fifth bits, the others."""
    first = 4 if has_least else 2
    last = first + 4 if has_fifth else first
    integers = _nibbles(blocks[:, last:], 16)
    if has_fifth:
        # Byte by byte.
        integers |= _upper_bits(blocks[:, first:last, None], 1).flatten(1)
    return _Numbers(integers, _halves(blocks, 0), -_halves(blocks, 2) if has_least else None)


def _unpack_q8_0(blocks: torch.Tensor) -> _Numbers:
    """Of 32 signed numbers behind a scale."""
    return _Numbers(blocks[:, 2:] ^ 0x80, _halves(blocks, 0), None)


def _unpack_k(blocks: torch.Tensor, *, has_fifth: bool) -> _Numbers:
    """Of 8 groups in 4 or 5 bits: two factors, with which 12 bytes of scales and least numbers in 6
    bits each are multiplied, the fifth bits, the others.
    """
    lower, middle, upper = blocks[:, 4:16].split(4, 1)
    scales = torch.cat([lower & 63, upper & 15 | lower >> 6 << 4], 1)
    least = torch.cat([middle & 63, upper >> 4 | middle >> 6 << 4], 1)
    integers = _nibbles(blocks[:, 48 if has_fifth else 16 :], 32)
    if has_fifth:
        integers |= _upper_bits(blocks[:, None, 16:48], 1).flatten(1)
    return _Numbers(integers, scales * _halves(blocks, 0), least * _halves(blocks, 2))


def _unpack_q6_k(blocks: torch.Tensor) -> _Numbers:
    """Of 16 groups: four bits, two bits, scales in int8, and their factor."""
    upper = _upper_bits(blocks[:, 128:192].unflatten(1, (2, 32)), 2).flatten(1)
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return _Numbers(_nibbles(blocks[:, :128], 64) | upper, scales * _halves(blocks, 208), None)


def _small(num_bytes: int, bits: int, *, has_least: bool) -> _Block:
    def unpack(blocks: torch.Tensor) -> _Numbers:
        return _unpack_small(blocks, has_least=has_least, has_fifth=bits == 5)

    return _Block(32, num_bytes, bits, 32, unpack, is_symmetric=not has_least)


def _of_k(num_bytes: int, bits: int) -> _Block:
    def unpack(blocks: torch.Tensor) -> _Numbers:
        return _unpack_k(blocks, has_fifth=bits == 5)

    return _Block(256, num_bytes, bits, 32, unpack, is_symmetric=False)


_BLOCKS: Mapping[GGUFType, _Block] = {
    "Q4_0": _small(18, 4, has_least=False),
    "Q4_1": _small(20, 4, has_least=True),
    "Q5_0": _small(22, 5, has_least=False),
    "Q5_1": _small(24, 5, has_least=True),
    "Q8_0": _Block(32, 34, 8, 32, _unpack_q8_0),
    "Q4_K": _of_k(144, 4),
    "Q5_K": _of_k(176, 5),
    "Q6_K": _Block(256, 210, 6, 16, _unpack_q6_k),
}
