"""In which order the inputs of a matrix are multiplied, so that groups lie one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch.nn.functional import pad

_SMALLEST_GROUP = 32
ZERO_COLUMN = -1


@dataclass(frozen=True, slots=True)
class Order:
    """The inputs of a matrix, group by group."""

    columns: torch.Tensor | None
    """[num_columns] int64 of x, ZERO_COLUMN where a group was filled up; None: as they are."""
    num_columns: int
    group_size: int
    group_of: torch.Tensor
    """[num_columns / group_size] int64: the checkpoint's group of each of these groups."""
    is_filled_up: bool = False
    """Whether there is a ZERO_COLUMN."""

    def arrange(self, integers: torch.Tensor) -> torch.Tensor:
        """[rows, num_columns] of [rows, inputs]."""
        if self.columns is None:
            return integers
        # Whatever stands in columns of zeros is multiplied by zero.
        return integers.index_select(1, self.columns.clamp(min=0))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, num_columns] of x, [rows, inputs]."""
        if self.columns is None:
            return x
        if not self.is_filled_up:
            return x.index_select(1, self.columns)
        # An index of -1 is that of the last column.
        return pad(x, (0, 1))[:, self.columns]

    def equals(self, other: Order) -> bool:
        if (self.num_columns, self.group_size) != (other.num_columns, other.group_size):
            return False
        if self.columns is None or other.columns is None:
            return self.columns is other.columns
        return torch.equal(self.columns, other.columns)


def order_of_runs(inputs: range, group_size: int, device: torch.device) -> Order:
    """Of groups that lie one after the other; the first and the last may be cut."""
    first, last = inputs.start // group_size, (inputs.stop - 1) // group_size
    counts = [
        min(inputs.stop, (group + 1) * group_size) - max(inputs.start, group * group_size)
        for group in range(first, last + 1)
    ]
    return make_order(None, counts, list(range(first, last + 1)), group_size, device)


def order_of_index(groups: torch.Tensor, group_size: int) -> Order:
    """Of groups that each input names, as it likes; groups: [inputs] int64."""
    present, counts = groups.unique(return_counts=True)
    columns = groups.argsort(stable=True)
    if torch.equal(columns, torch.arange(len(columns), device=columns.device)):
        return make_order(None, counts.tolist(), present.tolist(), group_size, groups.device)
    return make_order(columns, counts.tolist(), present.tolist(), group_size, groups.device)


def make_order(
    columns: torch.Tensor | None,
    counts: Sequence[int],
    groups: Sequence[int],
    group_size: int,
    device: torch.device,
) -> Order:
    """Groups of one size out of groups of several.

    They are cut into smaller ones that share a scale; where that would make them too small for
    products, they are filled up with columns of zeros.

    Args:
        columns: [sum of counts] int64, the inputs group by group; None: as they are.
        counts: the inputs of each group.
        groups: the number of each in the checkpoint.
        group_size: that of groups that are whole.
    """
    common = gcd(*counts)
    if len(counts) == 1 or common == group_size:
        size = common
    else:
        smallest = min(_SMALLEST_GROUP, group_size)
        size = next((s for s in (128, 64, smallest) if common % s == 0), smallest)
    repeated = [
        group for group, n in zip(groups, counts, strict=True) for _ in range(-(-n // size))
    ]
    if common % size:
        if columns is None:
            columns = torch.arange(sum(counts), device=device)
        filled = [
            pad(run, (0, -len(run) % size), value=ZERO_COLUMN)
            for run in columns.split(list(counts))
        ]
        columns = torch.cat(filled)
    num_columns = len(repeated) * size
    is_filled_up = num_columns > sum(counts)
    return Order(columns, num_columns, size, torch.tensor(repeated, device=device), is_filled_up)
