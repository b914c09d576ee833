"""The work between input and output: an engine, and a bounded number of requests to it."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pagoda_runtime.batch.lines import BadLine, Line, pending, read_lines
from pagoda_runtime.batch.results import ResultFile, make_bad_result, make_result
from pagoda_runtime.client.engine_client import ENGINE_COMMAND, EngineClient
from pagoda_runtime.config import ServerConfig
from pagoda_runtime.errors import EngineDead, FatalError, PagodaError, QueueFull
from pagoda_runtime.server.answers import ChatCompletion, Completion
from pagoda_runtime.server.errors import ApiError, to_api_error
from pagoda_runtime.server.lifecycle import StopSignals
from pagoda_runtime.server.openai import BODIES, complete
from pagoda_runtime.server.run import load_from_folder, read_chat_template
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.tasks import running

logger = logging.getLogger("pagoda.batch")

# A file is its owner's own; it is read line by line.
MAX_LINE_BYTES = 32 * 1024 * 1024
SYNC_SECONDS = 1.0
PROGRESS_SECONDS = 10.0
QUEUE_FULL_SECONDS = 0.1


@dataclass(slots=True)
class Progress:
    """What came of this run's lines."""

    num_answers: int = 0
    num_errors: int = 0

    def count(self, *, is_error: bool) -> None:
        self.num_errors += is_error
        self.num_answers += not is_error


async def run_until_signal(
    config: ServerConfig, source: Path, destination: Path
) -> Progress | signal.Signals:
    """`run_batch`, or the signal that cancelled it."""
    stop = StopSignals()
    work = run_batch(config, source, destination)
    with stop.installed():
        async with running(work, stop.asked.wait()) as (answering, asked):
            await asyncio.wait((answering, asked), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                progress: Progress = answering.result()
                return progress
            assert stop.first is not None
            return stop.first


async def run_batch(
    config: ServerConfig,
    source: Path,
    destination: Path,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
) -> Progress:
    """Answer each line of source that has no line in destination yet.

    Raises: FatalError: a file cannot be used, the engine cannot start, or the disk is full;
        EngineDead. Whatever was answered until then is in destination.
    """
    chat_template = read_chat_template(config.chat_template)
    _refuse_same_file(source, destination)
    progress = Progress()
    results = ResultFile(destination)
    try:
        with open(source, "rb") as file:
            lines = pending(
                read_lines(file, tuple(BODIES), MAX_LINE_BYTES),
                results.custom_ids,
                results.line_numbers,
            )
            first = next(lines, None)
            if first is None:
                return progress
            async with _running_state(config, chat_template, engine_command) as state:
                reporter = asyncio.create_task(_report(progress, results))
                try:
                    num_at_once = _num_at_once(config)
                    await answer_all(state, chain([first], lines), results, progress, num_at_once)
                finally:
                    reporter.cancel()
    finally:
        results.close()
    return progress


async def answer_all(
    state: ServerState,
    lines: Iterator[Line | BadLine],
    results: ResultFile,
    progress: Progress,
    num_at_once: int,
) -> None:
    """Answer the lines, at most num_at_once at a time. The first exception ends all of them."""

    async def work() -> None:
        # All workers draw from one iterator: a line is read when somebody is free to answer it.
        for line in lines:
            if isinstance(line, BadLine):
                result = make_bad_result(line)
                await asyncio.sleep(0)  # a long run of bad lines must not stop the others
            else:
                result = make_result(line, await _answer(state, line))
            results.write(result)
            progress.count(is_error=result.error is not None)

    failures: list[BaseException] = []
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(num_at_once):
                group.create_task(work())
    except* PagodaError as errors:
        failures += errors.exceptions
    if failures:
        # When the engine dies, all workers hear the same. Not raised above: until Python 3.11.4
        # what is raised there becomes a group again.
        raise failures[0]


async def _answer(state: ServerState, line: Line) -> ChatCompletion | Completion | ApiError:
    """Raises EngineDead, since later lines would fail as this one did."""
    while True:
        try:
            return await complete(state, BODIES[line.url], line.body)
        except EngineDead:
            raise
        except QueueFull:
            # Lines with several prompts or choices filled the queue; it empties as they end.
            await asyncio.sleep(QUEUE_FULL_SECONDS)
        except Exception as error:
            api_error = to_api_error(error)
            if api_error.status == 500:
                logger.exception("A request failed.")
            return api_error


def _num_at_once(config: ServerConfig) -> int:
    """Twice what the engine computes at once, so that it never waits for the next line."""
    engine = config.engine
    return engine.max_num_seqs + min(engine.max_num_seqs, engine.max_num_waiting)


def _refuse_same_file(source: Path, destination: Path) -> None:
    try:
        with open(source, "rb"):
            pass
        is_same = destination.exists() and destination.samefile(source)
    except OSError as error:
        raise FatalError(
            "InvalidFlags", f"-i {source} cannot be read: {error.strerror}. Name a JSONL file."
        ) from error
    if is_same:
        raise FatalError("InvalidFlags", f"-i and -o are the same file, {source}. Name another -o.")


@asynccontextmanager
async def _running_state(
    config: ServerConfig, chat_template: str | None, engine_command: Sequence[str]
) -> AsyncIterator[ServerState]:
    """A server over an engine process, without HTTP."""
    started = time.monotonic()
    engine = EngineClient(config.engine, command=engine_command, log_level=config.log_level)
    try:
        state = ServerState(config, engine, chat_template)
        await engine.wait_ready()
        state.tokenizer = await load_from_folder(config.engine)(engine)
        logger.info("Loaded %s in %.1f s", config.engine.model, time.monotonic() - started)
        yield state
    finally:
        await engine.shutdown()


async def _report(progress: Progress, results: ResultFile) -> None:
    """Bring results to the disk and progress to the log, as long as the run goes."""
    started = last_report = time.monotonic()
    while True:
        await asyncio.sleep(SYNC_SECONDS)
        await asyncio.to_thread(results.sync)
        now = time.monotonic()
        if now - last_report >= PROGRESS_SECONDS:
            last_report = now
            done = progress.num_answers + progress.num_errors
            logger.info(
                "%d lines done, %d of them errors, %.1f a second",
                done,
                progress.num_errors,
                done / (now - started),
            )
