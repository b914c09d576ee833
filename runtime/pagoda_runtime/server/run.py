"""`pagoda serve`: the HTTP server is up at once, the engine loads beside it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from jinja2 import TemplateSyntaxError
from starlette.types import ASGIApp

from pagoda_runtime.client.engine_client import ENGINE_COMMAND, EngineClient
from pagoda_runtime.config import EngineConfig, ServerConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.keys import ApiKeys
from pagoda_runtime.logs import configure_logging
from pagoda_runtime.models.source import resolve_model
from pagoda_runtime.server.admin import create_admin_app
from pagoda_runtime.server.app import create_app
from pagoda_runtime.server.connections import (
    PROBE_ROOM,
    Connection,
    Room,
    raise_file_limit,
    share_files,
)
from pagoda_runtime.server.lifecycle import LoadTokenizer, StopSignals, live
from pagoda_runtime.server.listening import describe, listen, listen_on_path, tls_options
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.tracing import Tracer
from pagoda_runtime.tokenizer.chat_template import ChatTemplate
from pagoda_runtime.tokenizer.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("pagoda.server")

# For the last bytes of answers that are complete, when the server ends.
LAST_BYTES_SECONDS = 2
ENGINE_END_SECONDS = 5.0
# The admin port is for its owner alone.
ADMIN_CONNECTIONS, ADMIN_BACKLOG = 32, 16


class HttpServer(uvicorn.Server):
    """uvicorn without its own idea of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(config: ServerConfig) -> int:
    """Serve until a signal; the exit status. Raises FatalError when it cannot serve."""
    configure_logging(config.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve_async(config, load_from_folder(config.engine)))


async def serve_async(
    config: ServerConfig,
    load_tokenizer: LoadTokenizer,
    engine_command: Sequence[str] = ENGINE_COMMAND,
) -> int:
    """`serve` inside a running loop, with a tokenizer and an engine process of choice."""
    chat_template = read_chat_template(config.chat_template)
    keys = ApiKeys(config.api_key, config.api_key_file)
    tls = tls_options(config)
    stop = StopSignals()
    limit, backlog = _find_room(config)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(
            listen(config.host, config.port, backlog)
            if config.uds is None
            else listen_on_path(config.uds, backlog)
        )
        admin_listener = None
        if config.admin_port is not None:
            admin_listener = stack.enter_context(
                listen(config.admin_host, config.admin_port, ADMIN_BACKLOG, prefix="admin-")
            )
        stack.enter_context(stop.installed())
        engine = EngineClient(config.engine, command=engine_command, log_level=config.log_level)
        state = ServerState(config, engine, chat_template, keys)
        state.max_num_requests = limit - PROBE_ROOM
        servers = [_start_http(http_config(create_app(state), limit, backlog, tls), listener)]
        url = describe(listener, has_tls=bool(tls))
        logger.info("Listening on %s; loading %s", url, config.engine.model)
        if admin_listener is not None:
            admin = http_config(create_admin_app(state), ADMIN_CONNECTIONS, ADMIN_BACKLOG)
            servers.append(_start_http(admin, admin_listener))
            logger.info("Admin port on %s", describe(admin_listener))
        try:
            if config.otlp_traces_endpoint is not None:
                # Its imports take half a second, in which probes are to be answered.
                state.tracer = await asyncio.to_thread(Tracer, config.otlp_traces_endpoint)
            return await live(state, load_tokenizer, stop)
        finally:
            # Streams that are still open end with an error that says so, then HTTP ends.
            await engine.shutdown(0.0 if stop.insisted.is_set() else ENGINE_END_SECONDS)
            for server, _ in servers:
                server.should_exit = True
                server.force_exit = stop.insisted.is_set()
            await asyncio.gather(*(serving for _, serving in servers))
            if state.tracer is not None:
                await asyncio.to_thread(state.tracer.close)


def _find_room(config: ServerConfig) -> tuple[int, int]:
    """(connections at once, backlog) as the limit of open files allows."""
    num_files = raise_file_limit()
    num_requests = config.engine.max_num_seqs + config.engine.max_num_waiting
    limit, backlog = share_files(num_files, num_requests)
    if limit - PROBE_ROOM < num_requests:
        logger.warning(
            "%d open files (ulimit -n) leave room for %d requests at once; --max-num-seqs and "
            "--max-num-waiting are for %d. Raise the limit, or lower --max-num-waiting.",
            num_files,
            limit - PROBE_ROOM,
            num_requests,
        )
    return limit, backlog


def http_config(
    app: ASGIApp, limit: int, backlog: int, tls: Mapping[str, Any] | None = None
) -> uvicorn.Config:
    """How an application is served: `limit` connections at once, and backlog to be taken.

    tls: what `listening.tls_options` makes.
    """
    return uvicorn.Config(
        app,
        http=partial(Connection, room=Room(limit)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=backlog,
        timeout_graceful_shutdown=LAST_BYTES_SECONDS,
        **(tls or {}),
    )


def _start_http(
    config: uvicorn.Config, listener: socket.socket
) -> tuple[HttpServer, asyncio.Task[None]]:
    """A server and the task in which it serves."""
    server = HttpServer(config)
    return server, asyncio.create_task(server.serve(sockets=[listener]))


def read_chat_template(path: str | None) -> str | None:
    """The template's text. Raises FatalError InvalidFlags if it cannot be read or is no Jinja."""
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
        ChatTemplate(text)
    except (OSError, UnicodeDecodeError, TemplateSyntaxError) as error:
        raise FatalError(
            "InvalidFlags",
            f"--chat-template {path} cannot be used: {error}. Name a readable Jinja file.",
        ) from error
    return text


def load_from_folder(config: EngineConfig) -> LoadTokenizer:
    """Loads the model's tokenizer in a thread, beside the engine if the folder is local."""

    async def load(engine: EngineClient) -> Tokenizer:
        if not Path(config.model).expanduser().is_dir():
            # The engine downloads or converts; when it is ready the files are here.
            await engine.wait_ready()
        folder = await asyncio.to_thread(
            resolve_model, config.model, config.revision, quantization=config.quantization
        )
        return await asyncio.to_thread(load_tokenizer, folder)

    return load
