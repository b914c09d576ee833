"""How whole numbers of any width lie in memory for products on a GPU: see README.md."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from pagoda_kernels.grouped_linear import GroupedShape

TILE = 32
"""Outputs whose words lie side by side."""
WORD_BITS = 16
# No MappingProxyType: Triton copies what its functions know of their module.
PLANES: Mapping[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of a number → the fields that it is cut into, the lowest first."""


# Products take 16 columns at least. A step of many runs is long enough with these.
_LEAST_LANES, _MOST_COLUMNS = 16, 128


class Packing(NamedTuple):
    """The columns of a matrix in steps of `runs` times `lanes` columns.

    A word, int16, has a field of one column of several runs; the words of a run's columns lie side
    by side. The last step may reach beyond the matrix.
    """

    bits: int
    lanes: int
    group_runs: int
    """Runs of a step that share scales."""
    is_e4m3: bool = False
    """Whether the numbers' bits are those of e4m3."""

    @property
    def runs(self) -> int:
        return WORD_BITS // min(PLANES[self.bits])

    @property
    def columns(self) -> int:
        """Of a step."""
        return self.runs * self.lanes

    @property
    def words(self) -> int:
        """Of a step, for each lane."""
        return self.runs * self.bits // WORD_BITS

    def num_steps(self, inputs: int) -> int:
        return -(-inputs // self.columns)


def choose_packing(shape: GroupedShape, *, is_e4m3: bool = False) -> Packing | None:
    """Runs that do not reach from one group into the next; None where they would have to."""
    if shape.bits not in PLANES:
        return None
    for lanes in (2 * _LEAST_LANES, _LEAST_LANES):
        packing = Packing(shape.bits, lanes, 0, is_e4m3)
        if packing.columns > _MOST_COLUMNS and lanes > _LEAST_LANES:
            continue
        if shape.group_size == shape.inputs:
            return packing._replace(group_runs=packing.runs)
        if shape.group_size % lanes == 0:
            return packing._replace(group_runs=gcd(shape.group_size // lanes, packing.runs))
    return None


def pack(integers: torch.Tensor, packing: Packing) -> torch.Tensor:
    """[num_rows, num_steps, words, lanes] int16 of [num_rows, inputs] uint8."""
    num_rows, inputs = integers.shape
    num_steps = packing.num_steps(inputs)
    padded = pad(integers, (0, num_steps * packing.columns - inputs)).int()
    runs = padded.view(num_rows, num_steps, packing.runs, packing.lanes)
    words, first = [], 0
    for width in PLANES[packing.bits]:
        fields = (runs >> first) & (2**width - 1)
        fields = fields.view(num_rows, num_steps, -1, WORD_BITS // width, packing.lanes)
        places = torch.arange(0, WORD_BITS, width, device=integers.device)[:, None]
        words.append((fields << places).sum(3, dtype=torch.int32).to(torch.int16))
        first += width
    return torch.cat(words, 2)
