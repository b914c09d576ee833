"""The engine as the API process sees it: starts the process, streams tokens, notices its death."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import zmq

from pagoda_runtime.client.environment import engine_environment
from pagoda_runtime.client.stream import Mailbox, RequestStream
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import EngineDead, FatalError, PagodaError, RequestError
from pagoda_runtime.ipc.death import count_oom_kills, describe_exit
from pagoda_runtime.ipc.limits import verify_fits, verify_queue_has_room
from pagoda_runtime.ipc.messages import (
    AbortRequests,
    EngineFailed,
    EngineReady,
    EngineRequest,
    EngineStats,
    FinishChoices,
    Launch,
    LoadProgress,
    PrefixCacheReset,
    ResetPrefixCache,
    Shutdown,
    StepOutput,
    ToApi,
    ToEngine,
)
from pagoda_runtime.ipc.sockets import SocketFolder, input_address, output_address
from pagoda_runtime.sampling_params import SamplingParams

logger = logging.getLogger("pagoda.client")

ENGINE_COMMAND = (sys.executable, "-m", "pagoda_runtime.engine.process")
# Last words that were sent before the process ended are in the socket's buffer by then.
LAST_WORDS_SECONDS = 0.1


class EngineClient:
    """Spawns the engine process at once; `wait_ready` waits for the model.

    Make it on a running event loop: all methods belong to that loop.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        log_level: str = "info",
    ) -> None:
        self.config = config
        self.ready: EngineReady | None = None
        self.progress = LoadProgress(phase="start", percent=0.0)
        self.failure: EngineFailed | None = None
        self.last_step_seconds = time.monotonic()
        """time.monotonic() of the last step's arrival, or of the first request after idleness."""
        self.on_stats: Callable[[StepOutput], None] | None = None
        self._engine_stats = EngineStats(slots=config.max_num_seqs)
        self._mailboxes: dict[str, Mailbox] = {}
        self._resets: deque[asyncio.Future[int]] = deque()
        """Who waits for the prefix cache to be emptied, in the order of asking."""
        self._loop = asyncio.get_running_loop()
        self._settled = asyncio.Event()
        """Set when the engine is ready or has failed."""
        self._exited = asyncio.Event()
        self._is_shut_down = False
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToApi] = msgspec.msgpack.Decoder(ToApi)
        self._oom_kills_before = count_oom_kills()
        self._open_sockets()
        self._spawn(command, log_level)
        self._loop.add_reader(self._output_fd, self._read)
        # The descriptor tells of changes alone, and some may have been before anybody listened.
        self._loop.call_soon(self._read)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def num_open(self) -> int:
        """Requests that were taken and are not over."""
        return len(self._mailboxes)

    @property
    def stats(self) -> EngineStats:
        """The engine's latest state: running counts sequences, as the slots do.

        Every accepted request that does not run counts as waiting, those on their way included.
        """
        num_open, stats = len(self._mailboxes), self._engine_stats
        running = min(stats.running, sum(m.num_sequences for m in self._mailboxes.values()))
        waiting = max(num_open - running, min(stats.waiting, num_open))
        return msgspec.structs.replace(stats, running=running, waiting=waiting)

    async def wait_ready(self) -> EngineReady:
        """Wait for the model. Raises FatalError with the engine's reason and message."""
        await self._settled.wait()
        if self.failure is not None:
            raise FatalError(self.failure.reason, self.failure.message)
        if self.ready is None:
            raise EngineDead("The engine was shut down before it was ready.")
        return self.ready

    def make_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        stream_interval: int = 1,
        second_text_start: int = 0,
    ) -> EngineRequest:
        """What `generate` takes: a request that this engine can serve, whatever else it does.

        Args:
            priority: lower is served earlier.
            cache_salt: prefixes are shared only among requests with the same salt.
            stream_interval: tokens of a choice that come at once, the first one excepted; each
                delta takes time from the engine where they share the cores.
            second_text_start: of a pair, as `ScheduledRow` has it.
        Raises: PromptTooLong, RequestError (values out of range, no or unknown tokens), EngineDead.
        """
        facts = self._verify_serving()
        sampling_params.verify()
        verify_fits(prompt_token_ids, sampling_params, facts)
        return EngineRequest(
            request_id=request_id,
            prompt_token_ids=list(prompt_token_ids),
            sampling_params=sampling_params,
            arrival_seconds=time.time(),
            priority=priority,
            cache_salt=cache_salt,
            stream_interval=stream_interval,
            second_text_start=second_text_start,
        )

    def generate(self, request: EngineRequest) -> RequestStream:
        """Take a request of `make_request` now and return its stream of deltas.

        Closing the stream, cancelling the task that waits on it, or dropping it aborts the request
        in the engine before its next step.

        Raises, at once and not at the first delta: RequestError (an id in use), QueueFull,
        EngineDead.
        """
        self._verify_serving()
        if request.request_id in self._mailboxes:
            raise RequestError(f"A request with the id {request.request_id!r} is running already.")
        verify_queue_has_room(
            len(self._mailboxes),
            max_num_seqs=self.config.max_num_seqs,
            max_num_waiting=self.config.max_num_waiting,
        )
        if not self._mailboxes:
            self.last_step_seconds = time.monotonic()
        params = request.sampling_params
        mailbox = Mailbox(request.request_id, params.num_sequences)
        self._mailboxes[request.request_id] = mailbox
        self._send(request)
        return RequestStream(
            mailbox, self._loop, params.num_choices, abort=self._abort, finish=self._finish_choice
        )

    async def reset_prefix_cache(self) -> int:
        """Empty the prefix cache; the number of blocks that held something. Raises EngineDead."""
        self._verify_serving()
        waiter: asyncio.Future[int] = self._loop.create_future()
        self._resets.append(waiter)
        self._send(ResetPrefixCache())
        return await waiter

    def _verify_serving(self) -> EngineReady:
        if self.failure is not None:
            raise EngineDead(self.failure.message)
        if self._is_shut_down:
            raise EngineDead("The engine was shut down.")
        if self.ready is None:
            raise PagodaError("The engine is still loading its model.")
        return self.ready

    async def shutdown(self, timeout_seconds: float = 10.0) -> None:
        """End the engine process after its current step; kill it when the time is over."""
        if not self._is_shut_down:
            self._is_shut_down = True
            self._fail_streams("The engine was shut down.")
            if self.ready is not None and not self._exited.is_set():
                self._send(Shutdown())
            else:
                # While it loads it reads no messages, but it ends with its standard input.
                self._close_stdin()
            try:
                await asyncio.wait_for(self._exited.wait(), timeout_seconds)
            except TimeoutError:
                logger.warning("The engine did not end in %.1f s; it is killed.", timeout_seconds)
                self._process.kill()
        await self._exited.wait()
        self._settled.set()
        self._loop.remove_reader(self._output_fd)
        self._close_stdin()
        self._input.close(linger=0)
        self._output.close(linger=0)
        self._context.term()
        self._folder.remove()

    def _open_sockets(self) -> None:
        self._folder = SocketFolder()
        self._context = zmq.Context()
        self._input = self._context.socket(zmq.PUSH)
        # Unbounded here, because verify_queue_has_room bounds what is sent.
        self._input.setsockopt(zmq.SNDHWM, 0)
        self._input.connect(input_address(self._folder.path))
        self._output = self._context.socket(zmq.PULL)
        self._output.bind(output_address(self._folder.path))
        self._output_fd = int(self._output.getsockopt(zmq.FD))

    def _spawn(self, command: Sequence[str], log_level: str) -> None:
        launch = Launch(config=self.config, socket_folder=self._folder.path, log_level=log_level)
        # Its standard output is this process's standard error: a library's chatter must not end up
        # in what a user's program prints.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=2, bufsize=0, env=engine_environment(os.environ)
        )
        assert self._process.stdin is not None
        # A process that is dead already is noticed below, as any other death.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)

    def _close_stdin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _send(self, message: ToEngine) -> None:
        self._input.send(self._encoder.encode(message), zmq.NOBLOCK)

    def _abort(self, request_id: str) -> None:
        if self._mailboxes.pop(request_id, None) is not None and not self._exited.is_set():
            self._send(AbortRequests(request_ids=[request_id]))

    def _finish_choice(self, request_id: str, index: int) -> None:
        if request_id in self._mailboxes and not self._exited.is_set():
            self._send(FinishChoices(request_id=request_id, indices=[index]))

    def _read(self) -> None:
        """Take all that is there: called by the event loop, through the socket's file descriptor.

        zmq.asyncio would do it with two more rounds of the loop for each message.
        """
        while not self._output.closed:
            try:
                self._take(self._decoder.decode(self._output.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return
            except Exception as error:
                self._loop.remove_reader(self._output_fd)
                logger.error("Cannot read the engine's messages.", exc_info=error)
                message = f"The engine's messages cannot be read: {error}; it is killed."
                self._fail(EngineFailed(reason="RankDied", message=message))
                self._process.kill()
                return

    def _take(self, message: ToApi) -> None:
        match message:
            case StepOutput():
                self._take_step(message)
            case PrefixCacheReset():
                waiter = self._resets.popleft()
                if not waiter.done():
                    waiter.set_result(message.num_blocks)
            case LoadProgress():
                self.progress = message
            case EngineReady():
                self.ready = message
                self.last_step_seconds = time.monotonic()
                self._settled.set()
            case EngineFailed():
                self._fail(message)

    def _take_step(self, output: StepOutput) -> None:
        self.last_step_seconds = time.monotonic()
        self._engine_stats = output.stats
        for delta in output.deltas:
            # Deltas of a request that was aborted meanwhile find no mailbox.
            mailbox = self._mailboxes.get(delta.request_id)
            if mailbox is not None:
                mailbox.put(delta)
                if delta.is_last:
                    del self._mailboxes[delta.request_id]
        if self.on_stats is not None:
            self.on_stats(output)

    def _fail(self, failure: EngineFailed) -> None:
        if self.failure is None:
            self.failure = failure
            self._settled.set()
            self._fail_streams(failure.message)

    def _fail_streams(self, message: str) -> None:
        mailboxes, self._mailboxes = self._mailboxes, {}
        for mailbox in mailboxes.values():
            mailbox.fail(message)
        for waiter in self._resets:
            if not waiter.done():
                waiter.set_exception(EngineDead(message))

    def _on_exit(self) -> None:
        """The process ended: called by the event loop, through the process's file descriptor."""
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._process.wait()
        is_out_of_memory = count_oom_kills() > self._oom_kills_before
        self._loop.call_later(LAST_WORDS_SECONDS, self._bury, status, is_out_of_memory)

    def _bury(self, status: int, is_out_of_memory: bool) -> None:
        if not self._is_shut_down:
            self._fail(describe_exit(status, is_out_of_memory))
        self._exited.set()
