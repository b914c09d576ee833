"""Offline inference: the engine as a Python class, as vLLM's users know it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.client import ENGINE_COMMAND, EngineClient
from pagoda_runtime.engine.detokenizer import IncrementalDetokenizer
from pagoda_runtime.errors import RequestError
from pagoda_runtime.models.source import resolve_model
from pagoda_runtime.models.tokenizer import Tokenizer, load_tokenizer
from pagoda_runtime.sampling_params import SamplingParams

Prompt = str | dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    """All tokens that were generated, the end token and those of a stop string included."""
    finish_reason: str
    """stop (end token, stop id or stop string) or length."""
    stop_reason: int | str | None = None
    """The stop id or stop string that ended it; None for the model's end token and for length."""
    logprobs: None = None
    """Always None: no log probabilities were requested."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What came of one prompt."""

    request_id: str
    prompt: str | None
    """None if the prompt was given as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    """Prompt tokens that were found in the prefix cache."""


class LLM:
    """A model in an engine process of its own.

    Args:
        model: a folder in Hugging Face layout, or org/name.
        flags: fields of EngineConfig: the flags of `pagoda serve` with underscores.
    Raises:
        TypeError: a keyword is no such field.
        FatalError: the engine cannot start; reason and message are the engine's.
    """

    def __init__(
        self, model: str, *, engine_command: Sequence[str] = ENGINE_COMMAND, **flags: Any
    ) -> None:
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        if unknown := sorted(flags.keys() - known):
            raise TypeError(
                f"LLM() has no keyword {', '.join(map(repr, unknown))}; it takes model and "
                f"{', '.join(sorted(known - {'model'}))}"
            )
        self.config = EngineConfig(model=model, **flags)
        self._request_numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="pagoda-llm", daemon=True
        )
        self._thread.start()
        self._client: EngineClient | None = None
        try:
            self._client = self._run(EngineClient.start(self.config, command=engine_command))
            self.facts = self._run(self._client.wait_ready())
            self._tokenizer = self._load_tokenizer()
        except BaseException:
            self.shutdown()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt and return the results in the order of the prompts.

        Args:
            prompts: a string, {"prompt_token_ids": [...]}, or a list of these.
            sampling_params: one for all prompts, or one for each; by default the model's own
                defaults (generation_config.json).
        Raises:
            RequestError: a prompt or its parameters are wrong; nothing was generated.
            EngineDead: the engine process ended.
        """
        client = self._running_client()
        prompt_list = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        if sampling_params is None:
            sampling_params = SamplingParams(**self.facts.default_sampling)  # type: ignore[arg-type]
        if isinstance(sampling_params, SamplingParams):
            params_list = [sampling_params] * len(prompt_list)
        else:
            params_list = list(sampling_params)
            if len(params_list) != len(prompt_list):
                raise RequestError(
                    f"{len(prompt_list)} prompts came with {len(params_list)} sampling parameters; "
                    "give one for all or one for each."
                )
        token_ids_list = [self._tokenize(prompt) for prompt in prompt_list]
        for token_ids, params in zip(token_ids_list, params_list, strict=True):
            client.verify(token_ids, params)
        return self._run(self._generate_all(client, prompt_list, token_ids_list, params_list))

    def shutdown(self) -> None:
        """End the engine process and the thread. A second call does nothing."""
        if self._loop.is_closed():
            return
        if self._client is not None:
            self._run(self._client.shutdown())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it on the loop's thread. KeyboardInterrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _running_client(self) -> EngineClient:
        if self._client is None or self._loop.is_closed():
            raise RuntimeError("This LLM was shut down.")
        return self._client

    def _load_tokenizer(self) -> Tokenizer:
        # The engine has downloaded the model by now; this only finds it.
        folder: Path = resolve_model(self.config.model, self.config.revision, lambda *_: None)
        return load_tokenizer(folder)

    def _tokenize(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt)
        if set(prompt) != {"prompt_token_ids"}:
            raise RequestError(
                f"A prompt has the keys {sorted(prompt)}; it must be a string or "
                '{"prompt_token_ids": [...]}.',
                param="prompt",
            )
        return list(prompt["prompt_token_ids"])

    async def _generate_all(
        self,
        client: EngineClient,
        prompts: Sequence[Prompt],
        token_ids_list: Sequence[list[int]],
        params_list: Sequence[SamplingParams],
    ) -> list[RequestOutput]:
        # The rest waits here: the engine's own queue would refuse it.
        places = asyncio.Semaphore(self.config.max_num_seqs + self.config.max_num_waiting)

        async def generate_one(
            prompt: Prompt, token_ids: list[int], params: SamplingParams
        ) -> RequestOutput:
            async with places:
                return await self._generate(client, prompt, token_ids, params)

        tasks = [
            asyncio.create_task(generate_one(*item))
            for item in zip(prompts, token_ids_list, params_list, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _generate(
        self,
        client: EngineClient,
        prompt: Prompt,
        prompt_token_ids: list[int],
        params: SamplingParams,
    ) -> RequestOutput:
        request_id = f"llm-{next(self._request_numbers)}"
        detokenizer = IncrementalDetokenizer(
            self._tokenizer, params, prompt_token_ids=prompt_token_ids
        )
        text, token_ids, num_cached_tokens = [], list[int](), 0
        finish_reason: str = "length"
        stop_reason: int | str | None = None
        stream = client.generate(request_id, prompt_token_ids, params)
        try:
            async for delta in stream:
                token_ids.extend(delta.new_token_ids)
                num_cached_tokens = delta.num_cached_tokens
                text.append(detokenizer.push(delta.new_token_ids))
                if delta.finish_reason is not None:
                    text.append(detokenizer.finish())
                    finish_reason, stop_reason = delta.finish_reason, delta.stop_reason
                if detokenizer.stopped_by is not None:
                    finish_reason, stop_reason = "stop", detokenizer.stopped_by
                    break
        finally:
            await stream.aclose()
        return RequestOutput(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=prompt_token_ids,
            outputs=[
                CompletionOutput(
                    index=0,
                    text="".join(text),
                    token_ids=token_ids,
                    finish_reason=finish_reason,
                    stop_reason=stop_reason,
                )
            ],
            num_cached_tokens=num_cached_tokens,
        )
