"""Steps of a runner that computes while it is asked, on a thread: the next is planned meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from pagoda_runtime.engine.core import Runner
from pagoda_runtime.ipc.messages import BlockCopy, EngineReady, Masks, RowOutput, ScheduledRow


class ThreadedRunner:
    """A runner that takes a step while the one before it runs: they run one after the other.

    Rows may end with a token that is still being computed (`ScheduledRow.row_in_flight`). The
    thread ends when nobody holds this any more.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._thread = ThreadPoolExecutor(1, "pagoda-step")
        self._before: Future[list[RowOutput]] | None = None

    @property
    def ready_facts(self) -> EngineReady:
        return self._runner.ready_facts

    def submit(
        self,
        rows: Sequence[ScheduledRow],
        copies: Sequence[BlockCopy] = (),
        masks: Masks | None = None,
    ) -> Future[list[RowOutput]]:
        runner, before = self._runner, self._before

        def execute() -> list[RowOutput]:
            # The step before is done: its tokens are there.
            known = rows if before is None else fill_in_flight(rows, before.result())
            return runner.submit(known, copies, masks).result()

        self._before = self._thread.submit(execute)
        return self._before


def fill_in_flight(
    rows: Sequence[ScheduledRow], outputs_before: Sequence[RowOutput]
) -> list[ScheduledRow]:
    """The rows with the tokens that the step before has sampled for them."""
    return [
        row
        if row.row_in_flight is None
        else msgspec.structs.replace(
            row,
            token_ids=[*row.token_ids[:-1], outputs_before[row.row_in_flight].token_ids[0]],
            row_in_flight=None,
        )
        for row in rows
    ]
