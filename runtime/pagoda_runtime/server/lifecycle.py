"""From the first request for the model to the end of the process: load, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from pagoda_runtime.client.engine_client import EngineClient
from pagoda_runtime.errors import FatalError
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.tasks import running
from pagoda_runtime.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("pagoda.server")

POLL_SECONDS = 0.05

LoadTokenizer = Callable[[EngineClient], Coroutine[Any, Any, Tokenizer]]


class StopSignals:
    """SIGTERM and SIGINT: the first asks for an end, the second for an end at once."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()

    def take(self, number: signal.Signals) -> None:
        if self.first is None:
            self.first = number
            self.asked.set()
        else:
            self.insisted.set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.take, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


async def live(state: ServerState, load_tokenizer: LoadTokenizer, stop: StopSignals) -> int:
    """Load, serve until a signal, drain; the exit status. Raises FatalError if it cannot serve."""
    async with running(stop.insisted.wait(), _load_and_serve(state, load_tokenizer, stop)) as (
        insisted,
        phases,
    ):
        await _first_of(insisted, phases)
        if phases.done():
            status: int = phases.result()
            return status
        assert stop.first is not None
        logger.warning("Second signal: ending at once with %d requests open.", state.num_requests)
        return 128 + stop.first


async def _first_of(*tasks: asyncio.Task[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _load_and_serve(
    state: ServerState, load_tokenizer: LoadTokenizer, stop: StopSignals
) -> int:
    async with running(
        stop.asked.wait(), _load(state, load_tokenizer), _wait_for_failure(state.engine)
    ) as (asked, loading, failing):
        await _first_of(asked, loading, failing)
        if loading.done():
            loading.result()
            await _first_of(asked, failing)
            if not failing.done():
                # A person's Ctrl-C has no load balancer behind it that could lag.
                is_by_machine = stop.first == signal.SIGTERM
                delay = state.config.drain_delay_seconds if is_by_machine else 0.0
                async with running(_drain(state, delay)) as (draining,):
                    await _first_of(draining, failing)
        if failing.done():
            failing.result()
        return 0


async def _load(state: ServerState, load_tokenizer: LoadTokenizer) -> None:
    started = time.monotonic()
    async with running(_report_phases(state.engine), load_tokenizer(state.engine)) as (
        _,
        tokenizer,
    ):
        # The engine goes first, because its last words name the cause best.
        ready = await state.engine.wait_ready()
        state.tokenizer = await tokenizer
    # What loading left is never garbage. Without this every full collection walks over it, and no
    # stream gets a token for tens of milliseconds.
    gc.collect()
    gc.freeze()
    kept = f"KV cache {ready.num_blocks} blocks of {ready.block_size} in {ready.kv_cache_dtype}"
    if (pooler := ready.pooler) is not None:
        kept = f"no KV cache, {pooler.size} numbers to {pooler.task} a text"
    logger.info(
        "Ready after %.1f s: %s on %d × %s in %s, context %d tokens, %s",
        time.monotonic() - started,
        ", ".join(state.model_names),
        ready.tensor_parallel_size,
        ready.device,
        ready.dtype,
        ready.max_model_len,
        kept,
    )


async def _report_phases(engine: EngineClient) -> None:
    """Log each phase of the engine's start with its seconds."""
    phase, started = engine.progress.phase, time.monotonic()
    while True:
        await asyncio.sleep(POLL_SECONDS)
        if engine.progress.phase != phase:
            now = time.monotonic()
            logger.info("Phase %s took %.1f s", phase, now - started)
            phase, started = engine.progress.phase, now


async def _wait_for_failure(engine: EngineClient) -> None:
    """Raise FatalError with the engine's last words, whenever it comes to them."""
    while engine.failure is None:
        await asyncio.sleep(POLL_SECONDS)
    raise FatalError(engine.failure.reason, engine.failure.message)


async def _drain(state: ServerState, delay_seconds: float) -> None:
    """Serve on for the delay, then refuse and let the running requests finish in their time."""
    limit = state.config.drain_seconds
    logger.info(
        "Draining: new requests for %g s more, running ones (%d now) for %g s after that",
        delay_seconds,
        state.num_requests,
        limit,
    )
    state.is_draining = True
    await asyncio.sleep(delay_seconds)
    state.is_refusing = True
    deadline = time.monotonic() + limit
    while state.num_requests and time.monotonic() < deadline:
        await asyncio.sleep(POLL_SECONDS)
    if state.num_requests:
        logger.warning("%d requests did not finish in %g s.", state.num_requests, limit)
