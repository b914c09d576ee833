from __future__ import annotations

import random

from pagoda_runtime.execution.row_tables import RowTables
from pagoda_runtime.ipc.messages import ScheduledRow


def make_row(name: str, block_table: list[int], index: int = 0) -> ScheduledRow:
    return ScheduledRow(
        request_id=name,
        index=index,
        token_ids=[0],
        start=0,
        block_table=block_table,
        sampling_params=None,
    )


def test_whatever_becomes_of_tables_a_step_finds_its_own():
    random_ = random.Random(0)
    tables = RowTables(num_rows=5, num_columns=12)
    sequences: dict[tuple[str, int], list[int]] = {}
    for _ in range(2000):
        for _ in range(random_.randint(1, 3)):
            name = (random_.choice("abcdefgh"), random_.randint(0, 1))
            table = sequences.setdefault(name, [])
            match random_.randint(0, 5):
                case 0:
                    # Preempted, or another sequence under the name of one that was.
                    table[:] = random_.choices(range(1, 99), k=random_.randint(1, 12))
                case 1 if table:
                    # A block of its own in the place of a shared one.
                    table[-1] = random_.randint(1, 99)
                case 2 if table:
                    # Behind the window.
                    count = random_.randint(0, len(table))
                    table[:count] = [0] * count
                case _ if len(table) < 12:
                    table.append(random_.randint(1, 99))
        some = random_.sample(sorted(sequences), k=min(len(sequences), random_.randint(1, 5)))
        rows = [make_row(name, sequences[name, i] or [1], i) for name, i in some]
        places = tables.place(rows)
        assert len(set(places.tolist())) == len(rows)
        found = tables.gather(places, 12)
        for row, blocks in zip(rows, found, strict=True):
            assert blocks[: len(row.block_table)].tolist() == row.block_table
    assert not tables.table[tables.padding_place].any()


def test_who_ran_last_keeps_its_place():
    tables = RowTables(num_rows=2, num_columns=1)
    first = tables.place([make_row("a", [1]), make_row("b", [2])])
    assert tables.place([make_row("a", [1])])[0] == first[0]
    # b is the longest gone.
    assert tables.place([make_row("c", [3])])[0] == first[1]
    assert tables.place([make_row("a", [1])])[0] == first[0]
