"""What the routes of one server share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import msgspec

from pagoda_runtime.client.engine_client import EngineClient
from pagoda_runtime.config import ServerConfig
from pagoda_runtime.errors import (
    EngineDead,
    ModelNotServed,
    QueueFull,
    RequestError,
    Unavailable,
    shown,
)
from pagoda_runtime.ipc.limits import verify_queue_has_room
from pagoda_runtime.ipc.messages import EngineReady, EngineStats
from pagoda_runtime.keys import ApiKeys
from pagoda_runtime.metrics import Metrics
from pagoda_runtime.server.answers import Load
from pagoda_runtime.server.body import default_max_body_bytes
from pagoda_runtime.server.route_table import ROUTES
from pagoda_runtime.server.structured import Structures
from pagoda_runtime.server.tracing import Tracer
from pagoda_runtime.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("pagoda.server")

T = TypeVar("T")

LOADING_RETRY_SECONDS = 5
DRAINING_RETRY_SECONDS = 1
# Up to here a prompt is tokenized in less time than a switch of threads takes.
INLINE_CHARACTERS = 2048
# Up to here a body is parsed within a millisecond, or refused by its shape.
INLINE_BODY_BYTES = 65536
# A text of so many takes a thread for some 50 ms; what is longer must not hold up the others.
PIECE_CHARACTERS = 32768
MAX_WARNED_FIELDS = 1000
# Clients choose the names, and what is kept of them is kept for good.
MAX_WARNED_CHARACTERS = 100


class ServerState:
    """Belongs to one event loop. `tokenizer` is None until the model is loaded; metrics follow the
    engine."""

    def __init__(
        self,
        config: ServerConfig,
        engine: EngineClient,
        chat_template: str | None = None,
        keys: ApiKeys | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.chat_template = chat_template
        self.keys = keys or ApiKeys(config.api_key, config.api_key_file)
        self.tokenizer: Tokenizer | None = None
        self.model_names = config.served_model_name or (config.engine.model,)
        self.created = int(time.time())
        self.is_draining = False
        """New requests are still served; their connections are closed after the answer."""
        self.is_refusing = False
        """New requests are answered with 503."""
        self.num_requests = 0
        """Requests for tokens that are not answered yet."""
        self.max_num_requests: int | None = None
        """Of num_requests, where connections are scarcer than places in the queue."""
        self.num_tokenizing = 0
        """Prompts that are accepted and not yet in the engine."""
        self.warned_fields: set[str] = set()
        self.tracer: Tracer | None = None
        self.metrics = Metrics(self.model_names[0], self, ROUTES)
        self.structures = Structures(self.loaded, self.metrics)
        engine.on_stats = self.metrics.observe_step
        # Few threads: tokenizing must leave the other cores to the engine.
        self._tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._long_text_thread = ThreadPoolExecutor(1, thread_name_prefix="long-text")
        self._template_threads = ThreadPoolExecutor(4, thread_name_prefix="template")
        self._parser_thread = ThreadPoolExecutor(1, thread_name_prefix="parser")

    @property
    def ready(self) -> EngineReady | None:
        return self.engine.ready

    @property
    def max_body_bytes(self) -> int:
        """Of one request."""
        max_model_len = 0 if self.ready is None else self.ready.max_model_len
        return self.config.max_body_bytes or default_max_body_bytes(max_model_len)

    @property
    def is_loaded(self) -> bool:
        return self.engine.ready is not None and self.tokenizer is not None

    def engine_counts(self) -> EngineStats:
        """The engine's stats; waiting includes the prompts that are being tokenized."""
        stats = self.engine.stats
        if not self.num_tokenizing:
            return stats
        return msgspec.structs.replace(stats, waiting=stats.waiting + self.num_tokenizing)

    def load(self) -> Load:
        """The load as `/load` and the header x-pagoda-load show it."""
        counts = self.engine_counts()
        return Load(
            running=counts.running,
            waiting=counts.waiting,
            slots=counts.slots or self.config.engine.max_num_seqs,
            kv_usage=round(counts.kv_usage, 6),
            preemptions_total=counts.preemptions_total,
            finished_total=counts.finished_total,
        )

    def loaded(self) -> tuple[EngineReady, Tokenizer]:
        """What a request needs. Raises EngineDead, or Unavailable while loading."""
        if self.engine.failure is not None:
            raise EngineDead(self.engine.failure.message)
        if self.engine.ready is None or self.tokenizer is None:
            raise Unavailable(
                "The model is still loading; /startup shows how far it is.", LOADING_RETRY_SECONDS
            )
        return self.engine.ready, self.tokenizer

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold one request for tokens open. Raises Unavailable, or QueueFull."""
        if self.is_refusing:
            raise Unavailable(
                "This server is shutting down; send the request again.", DRAINING_RETRY_SECONDS
            )
        if self.num_requests == self.max_num_requests:
            raise QueueFull(
                f"{self.num_requests} requests are in this server, as many as its connections "
                "allow. Try again later."
            )
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    @contextmanager
    def tokenizing(self, num_prompts: int) -> Iterator[Callable[[], None]]:
        """Count prompts as waiting until they are in the engine, as the yielded function is told
        of each. Raises QueueFull."""
        verify_queue_has_room(
            self.engine.num_open + self.num_tokenizing,
            num_prompts,
            max_num_seqs=self.config.engine.max_num_seqs,
            max_num_waiting=self.config.engine.max_num_waiting,
        )
        num_left = num_prompts
        self.num_tokenizing += num_prompts

        def enter() -> None:
            nonlocal num_left
            num_left -= 1
            self.num_tokenizing -= 1

        try:
            yield enter
        finally:
            self.num_tokenizing -= num_left

    def verify_places(self, num_sequences: int, what: str, param: str) -> None:
        """Raise RequestError for more sequences than this server ever holds; `what` they are."""
        slots, places = self.config.engine.max_num_seqs, self.config.engine.max_num_waiting
        if num_sequences > slots + places:
            raise RequestError(
                f"The request has {what}; this server takes at most {slots + places} at once: it "
                f"runs {slots} (--max-num-seqs) and lets {places} wait (--max-num-waiting). Send "
                "fewer in a request.",
                param=param,
            )

    async def parse(self, num_bytes: int, call: Callable[[], T]) -> T:
        """Run `call` at once if the body is short, else in the parser's thread."""
        if num_bytes <= INLINE_BODY_BYTES:
            return call()
        return await asyncio.get_running_loop().run_in_executor(self._parser_thread, call)

    async def off_loop(
        self, num_characters: int, call: Callable[[], T], num_of_request: int = 0
    ) -> T:
        """Run `call` at once if the text is short, else in a thread; what waits is cancelled with
        its request.

        Args:
            num_of_request: characters of all texts of the request. Many short ones are as much as
                a long one.
        """
        num_characters = max(num_characters, min(num_of_request, PIECE_CHARACTERS))
        if num_characters <= INLINE_CHARACTERS:
            return call()
        is_long = num_characters > PIECE_CHARACTERS
        thread = self._long_text_thread if is_long else self._tokenizer_thread
        return await asyncio.get_running_loop().run_in_executor(thread, call)

    async def render(self, call: Callable[[], T]) -> T:
        """Run a chat template, always in a thread: it is a program, and may take its time."""
        return await asyncio.get_running_loop().run_in_executor(self._template_threads, call)

    def verify_model(self, name: str | None) -> None:
        """Raise ModelNotServed, unless it is one of the names; None is the first of them."""
        if name is not None and name not in self.model_names:
            served = ", ".join(self.model_names)
            raise ModelNotServed(
                f"There is no model {shown(name)} here; this server has: {served}."
            )

    def warn_unknown(self, fields: Iterable[str]) -> None:
        """Log fields of a request that nobody knows, each once; bounded in number and length."""
        for name in fields:
            field = name[:MAX_WARNED_CHARACTERS]
            if field not in self.warned_fields and len(self.warned_fields) < MAX_WARNED_FIELDS:
                self.warned_fields.add(field)
                logger.warning("Unknown field in a request, ignored: %r", field)
