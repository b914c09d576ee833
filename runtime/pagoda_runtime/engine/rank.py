"""A rank's process: `python -m pagoda_runtime.engine.rank`, started by `engine.ranks`.

Standard input is a channel to rank 0: it brings RankLaunch and then steps, and takes what becomes
of them. Rank 0 schedules, answers and reports; here the same steps are executed, and that is all.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import msgspec

from pagoda_runtime.engine.core import Runner, StepInFlight
from pagoda_runtime.engine.failure import describe_failure
from pagoda_runtime.engine.loading import MakeRunner, UseDevice, make_model_runner, use_device
from pagoda_runtime.errors import FatalError
from pagoda_runtime.ipc.messages import RankLaunch, RankReady, RankStep, RankStepDone
from pagoda_runtime.logs import configure_logging

logger = logging.getLogger("pagoda.engine")

_PR_SET_PDEATHSIG = 1


def main(make_runner: MakeRunner, use: UseDevice = lambda *_: None) -> int:
    """Run a rank's process to its end and return its exit status. use: asked by each thread."""
    # Rank 0's process ends this one, whatever a terminal or a supervisor says to both.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # When that process dies the kernel kills this one, even if it is stopped or waits for it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    channel = Connection(os.dup(0))
    launch = msgspec.msgpack.decode(channel.recv_bytes(), type=RankLaunch)
    if os.getppid() != launch.parent_pid:
        return 1
    configure_logging(launch.log_level)
    try:
        runner = make_runner(launch.config, lambda *_: None, launch.rank, launch.socket_folder)
        gc.collect()
        gc.freeze()
        channel.send_bytes(msgspec.msgpack.encode(RankReady()))
        thread = ThreadPoolExecutor(1, "pagoda-result", use, (launch.config, launch.rank))
        _take_steps(channel, runner, launch.rank, thread)
    except Exception as error:
        _tell_failure(channel, launch.rank, error)
        return 1
    return 0


def _take_steps(channel: Connection, runner: Runner, rank: int, thread: ThreadPoolExecutor) -> None:
    """Begin each step as soon as it comes, until rank 0 closes the channel.

    Args:
        thread: waits for their ends, because where the device runs beside the host the next step
            is to be begun before one ends.
    """
    decoder = msgspec.msgpack.Decoder(RankStep)
    masks = msgspec.msgpack.Decoder(list[bytes])
    done = msgspec.msgpack.encode(RankStepDone())

    def finish(step: StepInFlight) -> None:
        try:
            step.result()
        except Exception as error:
            _tell_failure(channel, rank, error)
            os._exit(1)
        with contextlib.suppress(ConnectionError):
            channel.send_bytes(done)

    def wait_for_masks() -> list[bytes]:
        # Rank 0 computes them, and the same runner there asks for them in the same step.
        return masks.decode(channel.recv_bytes())

    while True:
        try:
            step = decoder.decode(channel.recv_bytes())
        except (EOFError, ConnectionError):
            # The latter if it closed before it read all.
            return
        thread.submit(finish, runner.submit(step.rows, step.copies, wait_for_masks))


def _tell_failure(channel: Connection, rank: int, error: Exception) -> None:
    if not isinstance(error, FatalError):
        logger.error("Rank %d failed.", rank, exc_info=error)
    failure = describe_failure(error, f"Rank {rank}")
    with contextlib.suppress(OSError):
        channel.send_bytes(msgspec.msgpack.encode(failure))


if __name__ == "__main__":
    # Not sys.exit: a process group that broke off in the middle aborts where it is torn down.
    os._exit(main(make_model_runner, use_device))
