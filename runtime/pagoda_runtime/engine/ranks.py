"""The processes of ranks 1 and up, as rank 0's process starts, feeds and watches them.

All ranks execute the same steps, and meet in collectives. When one of them dies or hangs the others
wait there for ever, rank 0 too, so a thread of its process watches, and ends it with the reason.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
_VERDICT_SECONDS = 4 * _GRACE_SECONDS
_END_SECONDS = 2.0


@dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    channel: Connection
    pidfd: int
    since: float
    """time.monotonic() when it could begin the step that it is in, or was seen to load."""
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
        self._is_closing = False
        self._lock = threading.Lock()
        """Of what the steps and the watch both change: _num_steps, and a rank's num_done, since."""
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
        message = self._encoder.encode(RankStep(rows, copies))
        with self._lock:
            idle = [rank for rank in self._ranks if rank.num_done == self._num_steps]
            self._num_steps += 1
            for rank in idle:
                rank.since = time.monotonic()
        if len(idle) == len(self._ranks):
            os.eventfd_write(self._wake, 1)
        for rank in self._ranks:
            rank.channel.send_bytes(message)

    def await_verdict(self) -> None:
        """Give the watch the time to end this process, if another rank is what made it fail."""
        self._watch_thread.join(_VERDICT_SECONDS)

    def close(self) -> None:
        """End all other ranks."""
        self._is_closing = True
        os.eventfd_write(self._wake, 1)
        self._watch_thread.join()
        for rank in self._ranks:
            rank.channel.close()
        deadline = time.monotonic() + _END_SECONDS
        for rank in self._ranks:
            try:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()

    def _spawn(self, launch: RankLaunch, command: Sequence[str], number: int) -> _Rank:
        ours, theirs = Pipe()
        # Its standard output is this process's standard error, as that of this process is.
        process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=2)
        theirs.close()
        launch = msgspec.structs.replace(launch, rank=number)
        ours.send_bytes(self._encoder.encode(launch))
        return _Rank(number, process, ours, os.pidfd_open(process.pid), time.monotonic())

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:
            # Without a watch nobody would end what waits for a rank.
            logger.error("The watch of the ranks failed.", exc_info=error)
            self._end(describe_failure(error, "The watch of the ranks"))

    def _watch(self) -> None:
        signs = [self._wake]
        signs += [sign for rank in self._ranks for sign in (rank.channel.fileno(), rank.pidfd)]
        while True:
            found = wait(signs, self._seconds_left())
            if self._is_closing:
                return
            if self._wake in found:
                os.eventfd_read(self._wake)
            for rank in self._ranks:
                self._read(rank)
                rank.is_gone |= rank.pidfd in found
            if all(rank.is_ready for rank in self._ranks):
                self._ready.set()
            if any(rank.is_gone or rank.report for rank in self._ranks):
                return self._conclude(self._explain_death)
            if any(self._is_late(rank) for rank in self._ranks):
                return self._conclude(self._explain_silence)

    def _seconds_left(self) -> float | None:
        """Until some rank has been in its step for too long; None if all are idle."""
        with self._lock:
            since = [rank.since for rank in self._ranks if self._is_busy(rank)]
        if not since:
            return None
        return max(0.0, min(since) + self._timeout_seconds - time.monotonic())

    def _is_busy(self, rank: _Rank) -> bool:
        return not rank.is_ready or rank.num_done < self._num_steps

    def _is_late(self, rank: _Rank) -> bool:
        with self._lock:
            now = time.monotonic()
            if not self._is_busy(rank) or now - rank.since < self._timeout_seconds:
                return False
            if rank.is_ready or _is_stopped(rank.process.pid):
                return True
            # How long a model loads nobody knows.
            rank.since = now
            return False

    def _read(self, rank: _Rank) -> None:
        """Take all that a rank has said."""
        try:
            while rank.channel.poll():
                match self._decoder.decode(rank.channel.recv_bytes()):
                    case RankStepDone():
                        with self._lock:
                            rank.num_done += 1
                            rank.since = time.monotonic()
                    case RankReady():
                        rank.is_ready = True
                    case EngineFailed() as report:
                        rank.report = report
        except (EOFError, OSError):
            rank.is_gone = True

    def _conclude(self, explain: Callable[[], EngineFailed]) -> None:
        failure = explain()
        for rank in self._ranks:
            # One that is stopped ends by no other signal.
            rank.process.kill()
            rank.process.wait()
        if not self._is_closing:
            self._end(failure)

    def _explain_death(self) -> EngineFailed:
        """What a rank says of its end, or what its status does; a signal comes before words."""
        time.sleep(_GRACE_SECONDS)
        for rank in self._ranks:
            self._read(rank)
        statuses = [(rank, rank.process.poll()) for rank in self._ranks]
        is_out_of_memory = count_oom_kills() > self._oom_kills_before
        deaths = [
            describe_exit(status, is_out_of_memory, self._name(rank), self._when(rank))
            for rank, status in statuses
            if status is not None and (status < 0 or rank.report is None)
        ]
        reports = [rank.report for rank in self._ranks if rank.report is not None]
        # A broken connection is RankDied; who says more knows the cause.
        reports.sort(key=lambda report: report.reason == "RankDied")
        return [*deaths, *reports][0]

    def _explain_silence(self) -> EngineFailed:
        late = [rank for rank in self._ranks if self._is_late(rank)]
        stopped = [rank for rank in late if _is_stopped(rank.process.pid)]
        rank = (stopped or late)[0]
        cause = "it hangs, or waits for one that does"
        if stopped:
            cause = "its process is stopped"
        return EngineFailed(
            reason="RankDied",
            message=f"{self._name(rank)} did not answer for {self._timeout_seconds:g} s "
            f"(--collective-timeout-seconds){self._when(rank)}: {cause}.",
        )

    def _name(self, rank: _Rank) -> str:
        return f"Rank {rank.number} of {self._size} (--tensor-parallel-size)"

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
        self, rows: Sequence[ScheduledRow], copies: Sequence[BlockCopy] = ()
    ) -> StepInFlight:
        self._ranks.begin_step(rows, copies)
        return self._runner.submit(rows, copies)


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] in ("T", "t")
