"""An engine and a tokenizer without a model, and a server on a loopback port, for tests.

The fake engine answers with the bytes of its `answer`, one a step, over and over.
`python -m pagoda_runtime.server.testing ARGS` is `pagoda serve ARGS` with the byte tokenizer and
the engine process of `pagoda_runtime.testing`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, cast

import uvicorn

from pagoda_runtime.client.engine_client import EngineClient
from pagoda_runtime.config import EngineConfig, ServerConfig
from pagoda_runtime.errors import EngineDead, FatalError, exit_status
from pagoda_runtime.ipc.limits import verify_queue_has_room
from pagoda_runtime.ipc.messages import (
    EngineFailed,
    EngineReady,
    EngineRequest,
    EngineStats,
    LoadProgress,
    RequestDelta,
    StepOutput,
    TokenLogprobs,
)
from pagoda_runtime.last_words import write_last_words
from pagoda_runtime.logs import configure_logging
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.app import create_app
from pagoda_runtime.server.flags import parse_serve_args
from pagoda_runtime.server.run import http_config, serve_async
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.tokenizer.tokenizer import Tokenizer

FAKE_ENGINE_COMMAND = (sys.executable, "-m", "pagoda_runtime.testing")
VOCAB_SIZE = 256
READY = EngineReady(
    max_model_len=128,
    block_size=4,
    num_blocks=64,
    vocab_size=VOCAB_SIZE,
    max_num_seqs=256,
    eos_token_ids=[0],
    dtype="float32",
    kv_cache_dtype="float32",
    device="cpu",
    architecture="LlamaForCausalLM",
)


class ByteTokenizer:
    """A token is a byte of UTF-8; a conversation is its lines `role: content`."""

    vocab_size = VOCAB_SIZE
    eos_token_id = 0
    all_special_ids: frozenset[int] = frozenset({0})
    infill_format: str | None = None
    chat_template: str | None = None
    named_templates: Mapping[str, str] = {}
    special_token_ids: Mapping[str, int] = {}

    def __init__(self, encode_seconds: float = 0.0, longest_token: int = 1) -> None:
        self.encode_seconds = encode_seconds
        self.longest_token = longest_token

    def token_name(self, token_id: int) -> str:
        return f"<{token_id}>"

    def tokens_in_bytes(self) -> list[bytes]:
        return [bytes([token_id]) for token_id in range(VOCAB_SIZE)]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        time.sleep(self.encode_seconds)
        return list(text.encode())

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str]:
        return [chr(token_id) for token_id in token_ids]

    def text_offsets(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [number for number, letter in enumerate(text) for _ in letter.encode()]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in token_ids if not (skip_special_tokens and i in self.all_special_ids)]
        return bytes(kept).decode(errors="replace")

    def piece(self, token_id: int) -> str | None:
        return chr(token_id) if token_id < 128 else None

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        lines = []
        for message in messages:
            content = message["content"]
            text = content if isinstance(content, str) else "".join(p["text"] for p in content)
            lines.append(f"{message['role']}: {text}")
        return "\n".join([template or "", *lines, "assistant:" if add_generation_prompt else ""])


class FakeEngine(EngineClient):
    """The client of an engine without a process. All attributes may be set by a test."""

    def __init__(self, config: EngineConfig, *, answer: str = "héllo ", step_seconds: float = 0.0):
        self.config = config
        self.answer = answer.encode()
        self.step_seconds = step_seconds
        self.ready: EngineReady | None = READY
        self.progress = LoadProgress(
            phase="load", percent=40.0, bytes_per_second=1e6, eta_seconds=9.0
        )
        self.failure: EngineFailed | None = None
        self._is_shut_down = False
        self.last_step_seconds = time.monotonic()
        self.on_stats: Callable[[StepOutput], None] | None = None
        self.running: dict[str, SamplingParams] = {}
        self.prompts: dict[str, list[int]] = {}
        self.places: dict[str, tuple[int, str]] = {}
        """Priority and cache salt of each request."""
        self.num_finished = 0

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.running),
            slots=self.config.max_num_seqs,
            kv_usage=len(self.running) / 100,
            finished_total=self.num_finished,
        )

    async def wait_ready(self) -> EngineReady:
        while self.ready is None and self.failure is None:
            await asyncio.sleep(0.001)
        if self.failure is not None:
            raise FatalError(self.failure.reason, self.failure.message)
        assert self.ready is not None
        return self.ready

    @property
    def num_open(self) -> int:
        return len(self.running)

    def generate(self, request: EngineRequest) -> FakeStream:  # type: ignore[override]
        self._verify_serving()
        verify_queue_has_room(
            len(self.running),
            max_num_seqs=self.config.max_num_seqs,
            max_num_waiting=self.config.max_num_waiting,
        )
        self.running[request.request_id] = request.sampling_params
        self.prompts[request.request_id] = request.prompt_token_ids
        self.places[request.request_id] = (request.priority, request.cache_salt)
        return FakeStream(self, request.request_id)

    async def reset_prefix_cache(self) -> int:
        self._verify_serving()
        return 7

    async def shutdown(self, timeout_seconds: float = 0.0) -> None:
        self.failure = EngineFailed(reason="RankDied", message="The engine was shut down.")


class FakeStream:
    """One request of a FakeEngine. Its choice k begins k bytes later in the answer, and each of its
    tokens has the logprob -1 / (k + 1)."""

    def __init__(self, engine: FakeEngine, request_id: str) -> None:
        self.engine = engine
        self.request_id = request_id
        self.params = engine.running[request_id]
        self.open = set(range(self.params.num_sequences))
        self.num_tokens = 0

    def __aiter__(self) -> AsyncIterator[RequestDelta]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[RequestDelta]:
        engine = self.engine
        while self.request_id in engine.running:
            await asyncio.sleep(engine.step_seconds)
            if engine.failure is not None:
                raise EngineDead(engine.failure.message)
            engine.last_step_seconds = time.monotonic()
            self.num_tokens += 1
            deltas = [self._make_delta(index) for index in sorted(self.open)]
            if engine.on_stats is not None:
                stats = EngineStats(num_scheduled_tokens=len(engine.running))
                engine.on_stats(StepOutput(deltas=deltas, stats=stats))
            for delta in deltas:
                index = delta.index
                if index in self.open:
                    if delta.finish_reason is not None:
                        self.finish(index)
                    yield delta

    def _make_delta(self, index: int) -> RequestDelta:
        engine, params, logprob = self.engine, self.params, -1 / (index + 1)
        token = engine.answer[(self.num_tokens - 1 + index) % len(engine.answer)]
        is_stop, is_last = token in params.stop_token_ids, self.num_tokens == params.max_tokens
        eos_token_ids = (
            () if params.ignore_eos or engine.ready is None else engine.ready.eos_token_ids
        )
        is_end = token in eos_token_ids
        is_first = self.num_tokens == 1
        prompt_logprobs = None
        if params.prompt_logprobs is not None and is_first and index == 0:
            prompt = engine.prompts[self.request_id]
            top = params.prompt_logprobs
            prompt_logprobs = [fake_logprobs(token, -2.0, top) for token in prompt[1:]]
        return RequestDelta(
            request_id=self.request_id,
            index=index,
            new_token_ids=[token],
            logprobs=(
                None
                if params.logprobs is None
                else [fake_logprobs(token, logprob, params.logprobs)]
            ),
            prompt_logprobs=prompt_logprobs,
            finish_reason="stop" if is_stop or is_end else "length" if is_last else None,
            stop_reason=token if is_stop else None,
            cumulative_logprob=logprob * self.num_tokens if params.needs_logprobs else None,
            num_cached_tokens=4,
            queue_seconds=0.001 if is_first and index == 0 else None,
        )

    def finish(self, index: int) -> None:
        self.open.discard(index)
        if not self.open and self.engine.running.pop(self.request_id, None) is not None:
            self.engine.num_finished += 1

    async def aclose(self) -> None:
        for index in list(self.open):
            self.finish(index)


def fake_logprobs(token_id: int, logprob: float, num_top: int) -> TokenLogprobs:
    """The logprobs of a token that is the second likeliest; the likeliest is the letter behind."""
    likely = [(token_id + 1, logprob + 0.5), (token_id, logprob)]
    unlikely = [(token_id - rank, logprob - rank) for rank in range(1, max(1, num_top - 1))]
    return TokenLogprobs(token_id, logprob, 2, [*likely, *unlikely][:num_top])


def make_config(*flags: str) -> ServerConfig:
    """The config of `pagoda serve fake FLAGS` on a free loopback port."""
    return parse_serve_args(["fake", "--host", "127.0.0.1", "--port", "0", *flags])


@contextlib.asynccontextmanager
async def running_server(state: ServerState, max_connections: int = 1000) -> AsyncIterator[str]:
    """A real HTTP server around the state; yields its base URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(state)
        config = http_config(app, max_connections, backlog=100)
        config.load()
        server = uvicorn.Server(config)
        # Without uvicorn's main loop, whose naps would cost each test a fifth of a second.
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[listener])
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for connection in list(server.server_state.connections):
                connection.shutdown()
            await asyncio.gather(*server.server_state.tasks)
            for listening in server.servers:
                listening.close()


def make_state(
    engine: FakeEngine, config: ServerConfig, template: str | None = None
) -> ServerState:
    """The state of a server whose model is loaded."""
    state = ServerState(config, engine, template)
    state.tokenizer = cast(Tokenizer, ByteTokenizer())
    return state


def main(argv: Sequence[str]) -> int:
    """`pagoda serve` with fakes in place of model and tokenizer."""

    async def load(engine: EngineClient) -> Tokenizer:
        return cast(Tokenizer, ByteTokenizer())

    try:
        config = parse_serve_args(argv)
        configure_logging(config.log_level)
        return asyncio.run(serve_async(config, load, FAKE_ENGINE_COMMAND))
    except FatalError as error:
        write_last_words(error.reason, error.message)
        return exit_status(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
