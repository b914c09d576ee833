"""The processes of ranks 1 and up, as rank 0's process starts, feeds and watches them.

All ranks execute the same steps, and meet in collectives. When one of them dies or hangs the others
wait there for ever, rank 0 too, so a thread of its process watches, and ends it with the reason.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import msgspec

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.core import Runner, StepInFlight
from pagoda_runtime.engine.failure import describe_failure
from pagoda_runtime.ipc.death import count_oom_kills, describe_exit
from pagoda_runtime.ipc.messages import (
    BlockCopy,
    EngineFailed,
    EngineReady,
    Masks,
    RankLaunch,
    RankReady,
    RankStep,
    RankStepDone,
    ScheduledRow,
    ToRank0,
)

logger = logging.getLogger("pagoda.engine")

# After the first sign of trouble: a death breaks the connections of those who live, and what they
# say of that may come first.
_GRACE_SECONDS = 0.5
_END_SECONDS = 2.0
# Longer than the watch takes for all of it.
_VERDICT_SECONDS = _GRACE_SECONDS + 2 * _END_SECONDS + 0.5


@dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    channel: Connection
    pidfd: int
    heard_seconds: float
    """time.monotonic() of its last message, or when it was seen to load."""
    num_done: int = 0
    is_ready: bool = False
    is_gone: bool = False
    report: EngineFailed | None = None


class Ranks:
    """Starts a process for each rank but the first, which is this process.

    Make it on the main thread: the processes end with the thread that started them.

    Args:
        config: its model is on this machine.
        socket_folder: of the engine; ranks find each other there.
        end: ends this process with last words.
    """

    def __init__(
        self,
        config: EngineConfig,
        socket_folder: str,
        log_level: str,
        *,
        command: Sequence[str],
        end: Callable[[EngineFailed], None],
    ) -> None:
        self._size = config.tensor_parallel_size
        self._timeout_seconds = config.collective_timeout_seconds
        self._end = end
        self._num_steps = 0
        self._begun_seconds = time.monotonic()
        """Of the last step. This and the one above only steps change, and all else the watch."""
        self._is_closing = False
        self._wake = os.eventfd(0)
        self._ready = threading.Event()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToRank0] = msgspec.msgpack.Decoder(ToRank0)
        self._oom_kills_before = count_oom_kills()
        launch = RankLaunch(
            config=config,
            rank=0,
            socket_folder=socket_folder,
            parent_pid=os.getpid(),
            # Rank 0 tells what is the same on all of them.
            log_level=log_level if log_level == "debug" else "error",
        )
        self._ranks = [self._spawn(launch, command, number) for number in range(1, self._size)]
        self._watch_thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._watch_thread.start()

    def wait_ready(self) -> None:
        """Wait until all ranks take steps; if one of them fails this process ends."""
        self._ready.wait()

    def begin_step(self, rows: Sequence[ScheduledRow], copies: Sequence[BlockCopy]) -> None:
        """Let all other ranks execute a step."""
        # In this order: the watch asks first whether there is a step.
        self._begun_seconds = time.monotonic()
        self._num_steps += 1
        os.eventfd_write(self._wake, 1)
        self._send(RankStep(rows, copies))

    def share(self, masks: Masks) -> Sequence[bytes]:
        """The masks of the last step, which the other ranks wait for too."""
        found = masks()
        self._send(found)
        return found

    def _send(self, message: RankStep | Sequence[bytes]) -> None:
        encoded = self._encoder.encode(message)
        for rank in self._ranks:
            rank.channel.send_bytes(encoded)

    def await_verdict(self) -> None:
        """Give the watch the time to end this process, if another rank is what made it fail."""
        self._watch_thread.join(_VERDICT_SECONDS)

    def close(self) -> None:
        """End all other ranks; a step in flight comes to nothing."""
        self._is_closing = True
        os.eventfd_write(self._wake, 1)
        self._watch_thread.join()
        for rank in self._ranks:
            rank.channel.close()
        self._wait_for_ends()
        self._kill()
        for descriptor in (self._wake, *(rank.pidfd for rank in self._ranks)):
            os.close(descriptor)

    def _spawn(self, launch: RankLaunch, command: Sequence[str], number: int) -> _Rank:
        ours, theirs = Pipe()
        # Its standard output is this process's standard error, as that of this process is.
        process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=2)
        theirs.close()
        # The watch notices a process that is dead already.
        with contextlib.suppress(ConnectionError):
            ours.send_bytes(self._encoder.encode(msgspec.structs.replace(launch, rank=number)))
        return _Rank(number, process, ours, os.pidfd_open(process.pid), time.monotonic())

    def _run(self) -> None:
        try:
            failure = self._watch()
        except Exception as error:
            # Without a watch nobody would end what waits for a rank.
            logger.error("The watch of the ranks failed.", exc_info=error)
            failure = describe_failure(error, "The watch of the ranks")
        if failure is not None and not self._is_closing:
            self._kill()
            self._end(failure)

    def _watch(self) -> EngineFailed | None:
        """What is to end the engine; None once it is to end anyway."""
        signs = [self._wake]
        signs += [sign for rank in self._ranks for sign in (rank.channel.fileno(), rank.pidfd)]
        while True:
            due = min(map(self._due_seconds, self._ranks))
            left = None if due == math.inf else max(0.0, due - time.monotonic())
            found = wait(signs, left)
            now = time.monotonic()
            if self._is_closing:
                return None
            if self._wake in found:
                os.eventfd_read(self._wake)
            if now > due + _GRACE_SECONDS:
                # This process was stopped too, and the ranks had not all that time.
                for rank in self._ranks:
                    rank.heard_seconds = now
            for rank in self._ranks:
                self._read(rank)
                rank.is_gone |= rank.pidfd in found
            if all(rank.is_ready for rank in self._ranks):
                self._ready.set()
            if any(rank.is_gone or rank.report for rank in self._ranks):
                return self._explain_death()
            # Only what was waited for is late: this process can be stopped at any line of these.
            if due <= now and (late := [rank for rank in self._ranks if self._is_late(rank, now)]):
                return self._explain_silence(late)

    def _due_seconds(self, rank: _Rank) -> float:
        """time.monotonic() at which a rank will have been silent for too long."""
        if rank.is_ready and rank.num_done == self._num_steps:
            return math.inf
        return max(rank.heard_seconds, self._begun_seconds) + self._timeout_seconds

    def _is_late(self, rank: _Rank, now: float) -> bool:
        if now < self._due_seconds(rank):
            return False
        if rank.is_ready or _is_stopped(rank):
            return True
        # How long a model loads nobody knows.
        rank.heard_seconds = now
        return False

    def _read(self, rank: _Rank) -> None:
        """Take all that a rank has said."""
        try:
            while rank.channel.poll():
                match self._decoder.decode(rank.channel.recv_bytes()):
                    case RankStepDone():
                        rank.num_done += 1
                    case RankReady():
                        rank.is_ready = True
                    case EngineFailed() as report:
                        # What else it says follows from the first.
                        rank.report = rank.report or report
                rank.heard_seconds = time.monotonic()
        except (EOFError, OSError):
            rank.is_gone = True

    def _explain_death(self) -> EngineFailed:
        """What a rank says of its end, or what its status does; a signal comes before words."""
        time.sleep(_GRACE_SECONDS)
        for rank in self._ranks:
            self._read(rank)
        # A process closes its channel before it gives its memory back and ends.
        self._wait_for_ends([rank for rank in self._ranks if rank.is_gone])
        is_out_of_memory = count_oom_kills() > self._oom_kills_before
        deaths, reports = [], []
        for rank in self._ranks:
            status, who, when = rank.process.poll(), self._name(rank), self._when(rank)
            if rank.report is not None and (status is None or status >= 0):
                reports.append(rank.report)
            elif status is not None:
                deaths.append(describe_exit(status, is_out_of_memory, who, when))
            elif rank.is_gone:
                message = f"{who} broke off{when}, and does not end; see the kernel's log."
                deaths.append(EngineFailed(reason="RankDied", message=message))
        # A broken connection is RankDied; who says more knows the cause.
        reports.sort(key=lambda report: report.reason == "RankDied")
        return [*deaths, *reports][0]

    def _explain_silence(self, late: Sequence[_Rank]) -> EngineFailed:
        stopped = [rank for rank in late if _is_stopped(rank)]
        rank = [*stopped, *late][0]
        cause = "its process is stopped"
        if not stopped:
            cause = "it hangs, or waits for one that does. If steps take that long, raise it"
        return EngineFailed(
            reason="RankDied",
            message=f"{self._name(rank)} did not answer for {self._timeout_seconds:g} s "
            f"(--collective-timeout-seconds){self._when(rank)}: {cause}.",
        )

    def _kill(self) -> None:
        """Also what is stopped, and ends by no other signal."""
        for rank in self._ranks:
            rank.process.kill()
        self._wait_for_ends()

    def _wait_for_ends(self, ranks: Sequence[_Rank] | None = None) -> None:
        """Not for ever: a process that hangs in a driver ends by no signal at all."""
        deadline = time.monotonic() + _END_SECONDS
        for rank in self._ranks if ranks is None else ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, deadline - time.monotonic()))

    def _name(self, rank: _Rank) -> str:
        size = f"{self._size} (--tensor-parallel-size, engine.tensorParallelSize)"
        return f"Rank {rank.number} of {size}"

    def _when(self, rank: _Rank) -> str:
        if not rank.is_ready:
            return " while it loaded the model"
        if rank.num_done == self._num_steps:
            return f" after step {self._num_steps}"
        return f" in step {rank.num_done + 1}"


class RankedRunner:
    """Executes steps on all ranks, once all are ready; all have the same results, and rank 0's are
    what counts.
    """

    def __init__(self, runner: Runner, ranks: Ranks) -> None:
        self._runner, self._ranks = runner, ranks
        ranks.wait_ready()

    @property
    def ready_facts(self) -> EngineReady:
        return self._runner.ready_facts

    def submit(
        self,
        rows: Sequence[ScheduledRow],
        copies: Sequence[BlockCopy] = (),
        masks: Masks | None = None,
    ) -> StepInFlight:
        self._ranks.begin_step(rows, copies)
        shared = None if masks is None else partial(self._ranks.share, masks)
        return self._runner.submit(rows, copies, shared)


def _is_stopped(rank: _Rank) -> bool:
    """Whether its process was stopped by a signal."""
    stat = Path(f"/proc/{rank.process.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
