from __future__ import annotations

import numpy as np
import pytest

from pagoda_kernels.cpu.attention.sequences import Sequences

TABLE = np.array([[5, 2, 9, 0], [1, 7, 0, 0]], dtype=np.int32)
EXPECTED = [11, 36, 37, 38, 4, 5, 6, 7, 28, 29]


def list_slots(table, num_blocks=10):
    """Those of the last four tokens of one sequence, and of all six of another."""
    query_lens, seq_lens = np.array([4, 6]), np.array([11, 6])
    sequences = Sequences(query_lens, seq_lens, table, block_size=4, num_blocks=num_blocks)
    return sequences.newest_slots(np.arange(2), query_lens)


@pytest.mark.parametrize(
    "table",
    [
        TABLE,
        np.asfortranarray(TABLE),
        TABLE.astype(np.int64),
        np.repeat(TABLE, 2, axis=1)[:, ::2],
        np.concatenate((TABLE, TABLE), axis=1)[:, :4],
    ],
    ids=["plain", "by columns", "int64", "every second column", "part of a wider one"],
)
def test_slots_are_listed_whatever_the_tables_form(table):
    assert list_slots(table).tolist() == EXPECTED


@pytest.mark.parametrize("table", [TABLE[:1], TABLE[:, :2]], ids=["a row", "a column"])
def test_a_position_without_a_block_is_refused(table):
    with pytest.raises(IndexError, match=r"without a block|out of bounds"):
        list_slots(table)


@pytest.mark.parametrize("block", [-1, 9])
def test_a_block_outside_the_cache_is_refused(block):
    table = np.where(TABLE == 9, block, TABLE)
    with pytest.raises(IndexError, match="outside the cache"):
        list_slots(table, num_blocks=9)
