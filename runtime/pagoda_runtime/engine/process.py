"""The engine process: `python -m pagoda_runtime.engine.process`, started by `client.engine_client`.

Standard input brings one line of JSON (`Launch`) and then stays open as long as the parent lives.
Requests come in over one socket, progress and steps go out over another, all msgpack. A failure
goes out as EngineFailed; the parent writes it to the termination log, because it also notices the
deaths that leave this process no time for words.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.core import EngineCore, Runner, end_refused
from pagoda_runtime.engine.failure import describe_failure
from pagoda_runtime.engine.loading import FindModel, MakeRunner, find_model, make_model_runner
from pagoda_runtime.engine.overlap import ThreadedRunner
from pagoda_runtime.engine.pace import Pace
from pagoda_runtime.engine.ranks import RankedRunner, Ranks
from pagoda_runtime.engine.scheduler import SchedulerConfig
from pagoda_runtime.errors import FatalError, QueueFull, RequestError
from pagoda_runtime.ipc.messages import (
    AbortRequests,
    EngineFailed,
    EngineRequest,
    FinishChoices,
    Launch,
    LoadProgress,
    PrefixCacheReset,
    RequestDelta,
    ResetPrefixCache,
    Shutdown,
    StepOutput,
    ToApi,
    ToEngine,
)
from pagoda_runtime.ipc.sockets import input_address, output_address
from pagoda_runtime.logs import configure_logging
from pagoda_runtime.platforms import PLATFORMS

logger = logging.getLogger("pagoda.engine")

IDLE_CHECK_MILLISECONDS = 1000
LINGER_MILLISECONDS = 1000
RANK_COMMAND = (sys.executable, "-m", "pagoda_runtime.engine.rank")


class Outbox:
    """Sends to the API process. A lock, because downloads report progress from other threads."""

    def __init__(self, socket_folder: str) -> None:
        # A context of its own can be ended, and so all be sent, while others are in use.
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, LINGER_MILLISECONDS)
        self._socket.connect(output_address(socket_folder))
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._pace = Pace()

    def send(self, message: ToApi) -> None:
        with self._lock:
            self._socket.send(self._encoder.encode(message))

    def report_progress(self, phase: str, percent: float, bytes_per_second: float) -> None:
        with self._lock:
            eta = self._pace.seconds_left(phase, percent, time.monotonic())
        progress = LoadProgress(
            phase=phase, percent=percent, bytes_per_second=bytes_per_second, eta_seconds=eta
        )
        self.send(progress)

    def close(self) -> None:
        """Wait until all is sent, for LINGER_MILLISECONDS at most."""
        self._context.destroy()

    def end(self, failure: EngineFailed) -> None:
        """End this process with last words, whatever its other threads do."""
        # Never given back: nobody else has the last word.
        if self._lock.acquire(timeout=LINGER_MILLISECONDS / 1000):
            # An API process that hangs takes nothing more.
            with contextlib.suppress(zmq.Again):
                self._socket.send(self._encoder.encode(failure), zmq.NOBLOCK)
            self.close()
        os._exit(1)


class Inbox:
    """Receives from the API process."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

    def wait(self, milliseconds: int | None = None) -> bool:
        """Sleep until a message is there; False if the time ran out before."""
        return bool(self._socket.poll(milliseconds))

    def drain(self) -> Iterator[ToEngine]:
        """Every message that is there."""
        while True:
            try:
                yield self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return


def serve(core: EngineCore, inbox: Inbox, outbox: Outbox) -> None:
    """Step while there is work, sleep on the socket while there is none, end on Shutdown."""
    while True:
        if not core.has_work and not inbox.wait(IDLE_CHECK_MILLISECONDS):
            core.check()
            inbox.wait()
        refused: list[RequestDelta] = []
        for message in inbox.drain():
            match message:
                case EngineRequest():
                    refused.extend(_add(core, message))
                case AbortRequests():
                    core.abort(message.request_ids)
                case FinishChoices():
                    core.finish_choices(message.request_id, message.indices)
                case ResetPrefixCache():
                    outbox.send(PrefixCacheReset(num_blocks=core.reset_prefix_cache()))
                case Shutdown():
                    return
        output = core.step(time.time())
        if refused:
            output = StepOutput(deltas=[*refused, *output.deltas], stats=output.stats)
        outbox.send(output)


def _add(core: EngineCore, request: EngineRequest) -> list[RequestDelta]:
    try:
        core.add(request)
    except (RequestError, QueueFull) as error:
        # The client asks the same questions before it sends, so this is not expected; still the
        # request must end, and must not take the others with it.
        logger.error("Request %s was refused by the engine: %s", request.request_id, error)
        return [end_refused(request.request_id, error)]
    return []


def make_core(config: EngineConfig, runner: Runner) -> EngineCore:
    """The core of a loaded engine."""
    facts = runner.ready_facts
    platform = PLATFORMS[facts.device]
    config = platform.complete(config)
    assert config.max_num_batched_tokens is not None
    assert config.long_prefill_token_threshold is not None
    scheduler_config = SchedulerConfig(
        facts=msgspec.structs.replace(
            facts,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        ),
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        max_num_waiting=config.max_num_waiting,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    assert config.async_scheduling is not None
    if config.async_scheduling and not platform.is_asynchronous:
        runner = ThreadedRunner(runner)

    # Here and not above: llguidance and the tokenizer's library can come while the disk reads.
    from pagoda_runtime.grammar.compiler import Grammars
    from pagoda_runtime.tokenizer.tokenizer import load_tokenizer

    return EngineCore(
        runner,
        scheduler_config,
        seed=config.seed,
        overlap=config.async_scheduling,
        grammars=Grammars(
            lambda: load_tokenizer(Path(config.model)),
            vocab_size=facts.vocab_size,
            end_token_ids=facts.eos_token_ids,
        ),
    )


def main(
    make_runner: MakeRunner,
    find: FindModel = lambda config, _: config,
    rank_command: Sequence[str] = RANK_COMMAND,
) -> int:
    """Run the engine process to its end and return its exit status.

    Args:
        find: asked once, before all else.
        rank_command: runs `engine.rank.main` with the same runner.
    """
    launch = _read_launch()
    if launch is None:
        return 1
    context: zmq.Context[Any] = zmq.Context()
    input_socket = context.socket(zmq.PULL)
    # No bound here: the client bounds the requests that it lets in.
    input_socket.setsockopt(zmq.RCVHWM, 0)
    input_socket.bind(input_address(launch.socket_folder))
    outbox = Outbox(launch.socket_folder)
    config, folder = launch.config, launch.socket_folder
    ranks = None
    try:
        config = find(config, outbox.report_progress)
        if config.tensor_parallel_size > 1:
            ranks = Ranks(config, folder, launch.log_level, command=rank_command, end=outbox.end)
        runner = make_runner(config, outbox.report_progress, 0, folder)
        core = make_core(config, runner if ranks is None else RankedRunner(runner, ranks))
        # What loading left is never garbage; without this every full collection walks over it.
        gc.collect()
        gc.freeze()
        outbox.send(core.scheduler.facts)
        serve(core, Inbox(input_socket), outbox)
        # Ranks that end in the middle of a step break the others off, which is an error.
        core.close()
    except Exception as error:
        if ranks is not None:
            ranks.await_verdict()
        if not isinstance(error, FatalError):
            logger.error("The engine failed.", exc_info=error)
        outbox.send(describe_failure(error))
        return 1
    finally:
        if ranks is not None:
            ranks.close()
        context.destroy(linger=0)
        outbox.close()
    return 0


def _read_launch() -> Launch | None:
    """What the parent wants; None: it is gone. From now on this process ends with it."""
    # The parent drains on these, and then says Shutdown.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        line = stdin.readline()
    if not line:
        return None
    launch = msgspec.json.decode(line, type=Launch)
    configure_logging(launch.log_level)
    threading.Thread(
        target=_end_with_parent, args=[launch.socket_folder], name="parent-watch", daemon=True
    ).start()
    return launch


def _end_with_parent(socket_folder: str) -> None:
    """End this process when the parent's end of standard input closes, whatever it is doing."""
    while os.read(0, 1):
        pass
    # The parent may have been killed, and then nobody else would.
    shutil.rmtree(socket_folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(make_model_runner, find_model))
