"""The block tables of the sequences that run, as they are from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pagoda_runtime.ipc.messages import ScheduledRow

Ints = npt.NDArray[np.int64]


class RowTables:
    """Each sequence has a place, a row of a table, for as long as it is among the last that ran.

    A step's table is gathered from here. To make it of the rows' lists each time would take 3 ms
    for 256 rows of 512 blocks; to see what has changed takes 0.1 ms.

    table: [num_rows + 1, num_columns] int32; the last row is of block 0 alone, for padding.
    """

    def __init__(self, num_rows: int, num_columns: int) -> None:
        self.padding_place = num_rows
        self.table = np.zeros((num_rows + 1, num_columns), dtype=np.int32)
        self._held: list[list[int]] = [[] for _ in range(num_rows)]
        # Who ran last is last.
        self._places: dict[tuple[str, int], int] = {}

    def place(self, rows: Sequence[ScheduledRow]) -> Ints:
        """[num_rows]: the places of a step's rows, whose tables are there from now on."""
        assert len(rows) <= self.padding_place
        places, held = [], self._held
        for row in rows:
            place = self._find((row.request_id, row.index))
            places.append(place)
            # The lists mostly have the same numbers as objects, and then compare at once.
            if held[place] != row.block_table:
                self._write(place, row.block_table)
        return np.array(places, dtype=np.int64)

    def gather(self, places: Ints, num_columns: int) -> npt.NDArray[np.int32]:
        """[num_rows, num_columns]: what follows a sequence's last block is of earlier ones."""
        found: npt.NDArray[np.int32] = self.table[:, :num_columns][places]
        return found

    def _find(self, sequence: tuple[str, int]) -> int:
        place = self._places.pop(sequence, None)
        if place is None:
            place = len(self._places)
            if place == self.padding_place:
                place = self._places.pop(next(iter(self._places)))
        self._places[sequence] = place
        return place

    def _write(self, place: int, block_table: list[int]) -> None:
        held = self._held[place]
        # Mostly a block was added.
        first = len(held) if block_table[: len(held)] == held else 0
        self.table[place, first : len(block_table)] = block_table[first:]
        self._held[place] = list(block_table)
