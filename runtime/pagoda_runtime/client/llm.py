"""Offline inference: the engine as a Python class, as vLLM's users know it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Literal, TypeVar

from pagoda_runtime.client.engine_client import ENGINE_COMMAND, EngineClient
from pagoda_runtime.client.output_processor import OutputProcessor, WholeChoice, engine_params
from pagoda_runtime.client.outputs import RequestOutput, describe, make_outputs
from pagoda_runtime.client.pooled_llm import PooledLLM, finish_all
from pagoda_runtime.client.pooling import verify_generates
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import RequestError
from pagoda_runtime.grammar.compiler import Grammars
from pagoda_runtime.grammar.vocabulary import light_vocabulary
from pagoda_runtime.ipc.messages import EngineReady, EngineRequest
from pagoda_runtime.models.source import resolve_model
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.tokenizer.tokenizer import add_bad_words, load_tokenizer

Prompt = str | dict[str, Any]
EncodedPrompt = tuple[str | None, list[int]]
"""Text, if the prompt was given as text, and token ids."""
Conversation = Sequence[Mapping[str, Any]]
"""Messages with role and content."""
T = TypeVar("T")
_Request = tuple[str | None, SamplingParams, EngineRequest]
"""The prompt and parameters as the user gave them, and what the engine is asked for."""
_OnFinished = Callable[[int, int], None]
"""Takes the number of a prompt's tokens, and of those generated over all its choices."""

# Nobody watches the tokens come: all but the first wait for so many, or for the end.
_STREAM_INTERVAL = 64


class LLM(PooledLLM):
    """A model in an engine process of its own.

    Args:
        model: a folder in Hugging Face layout, a GGUF file, or org/name.
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
            self.facts = self._run(self._start(engine_command))
            # The engine has downloaded the model by now; this only finds it.
            folder = resolve_model(
                model, self.config.revision, quantization=self.config.quantization
            )
            self._tokenizer = load_tokenizer(folder)
            self._grammars = Grammars(
                lambda: self._tokenizer,
                vocab_size=self.facts.vocab_size,
                end_token_ids=self.facts.eos_token_ids,
                make_vocabulary=light_vocabulary,
            )
        except BaseException:
            self.shutdown()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Continue every prompt and return the results in the order of the prompts.

        Args:
            prompts: a string, {"prompt": ...}, {"prompt_token_ids": [...]}, or a list of these.
            sampling_params: one for all prompts, or one for each; by default the model's own
                defaults (generation_config.json).
            use_tqdm: show progress on standard error.
            priority: one for all prompts, or one for each; lower is served earlier.
            cache_salt: prefixes are shared only among requests with the same salt.
        Raises:
            RequestError: a prompt or its parameters are wrong; nothing was generated.
            EngineDead: the engine process ended.
        """
        texts = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        encoded = [self._encode(prompt) for prompt in texts]
        return self._generate_all(encoded, sampling_params, use_tqdm, priority, cache_salt)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int | Sequence[int] = 0,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Answer every conversation: `generate` for what the chat template makes of it.

        Args:
            messages: a list of {"role": ..., "content": ...}, or a list of such lists.
            chat_template: Jinja text that replaces the model's own template.
            add_generation_prompt: whether the prompt ends where the assistant begins to speak.
            chat_template_kwargs: further variables of the template.
        Raises: RequestError, EngineDead: as generate; also when there is no template.
        """
        if chat_template is None and self._tokenizer.chat_template is None:
            raise RequestError(
                "This model has no chat template. Pass chat_template=..., or use generate().",
                param="messages",
            )
        encoded = []
        for conversation in _list_conversations(messages):
            text = self._tokenizer.apply_chat_template(
                conversation,
                template=chat_template,
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            # The template writes the special tokens itself.
            encoded.append((text, self._tokenizer.encode(text, add_special_tokens=False)))
        return self._generate_all(encoded, sampling_params, use_tqdm, priority, cache_salt)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        beam_width: int,
        max_tokens: int | None = 16,
        *,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        ignore_eos: bool = False,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The beam_width likeliest continuations of every prompt, best first.

        Args:
            max_tokens: of each continuation; None: as many as the context holds.
            length_penalty: they are ranked by cumulative_logprob / length ** length_penalty.
            early_stopping: True ends at beam_width finished ones, False when no running one is
                likely to beat them, "never" when none can.
        Raises: RequestError, EngineDead: as generate.
        """
        params = SamplingParams(
            use_beam_search=True,
            n=beam_width,
            beam_width=beam_width,
            max_tokens=max_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            ignore_eos=ignore_eos,
        )
        return self.generate(prompts, params, use_tqdm=use_tqdm)

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

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _open_client(self) -> EngineClient:
        if self._client is None or self._loop.is_closed():
            raise RuntimeError("This LLM was shut down.")
        return self._client

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it on the loop's thread. KeyboardInterrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    async def _start(self, command: Sequence[str]) -> EngineReady:
        self._client = EngineClient(self.config, command=command)
        return await self._client.wait_ready()

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        if isinstance(prompt, str):
            return prompt, self._tokenizer.encode(prompt)
        if set(prompt) == {"prompt"}:
            return prompt["prompt"], self._tokenizer.encode(prompt["prompt"])
        if set(prompt) == {"prompt_token_ids"}:
            return None, list(prompt["prompt_token_ids"])
        raise RequestError(
            f"A prompt has the keys {sorted(prompt)}; it must be a string, "
            '{"prompt": ...} or {"prompt_token_ids": [...]}.',
            param="prompt",
        )

    def _generate_all(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        priority: int | Sequence[int],
        cache_salt: str,
    ) -> list[RequestOutput]:
        client = self._open_client()
        verify_generates(self.facts)
        if sampling_params is None:
            sampling_params = SamplingParams(**self.facts.default_sampling)  # type: ignore[arg-type]
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [add_bad_words(self._tokenizer, sampling_params)] * len(prompts)
        else:
            sampling_params = [add_bad_words(self._tokenizer, params) for params in sampling_params]
        priorities = [priority] * len(prompts) if isinstance(priority, int) else list(priority)
        for name, values in (("sampling parameters", sampling_params), ("priorities", priorities)):
            if len(values) != len(prompts):
                raise RequestError(
                    f"{len(prompts)} prompts came with {len(values)} {name}; give one for all or "
                    "one for each."
                )
        # All are verified before the first one runs.
        for grammar in {params.grammar for params in sampling_params}:
            if grammar is not None:
                self._grammars.verify(grammar)
        requests = [
            (
                text,
                params,
                client.make_request(
                    f"llm-{next(self._request_numbers)}",
                    token_ids,
                    engine_params(params),
                    priority=priority,
                    cache_salt=cache_salt,
                    # A stop string is looked for at once: what follows it is computed in vain.
                    stream_interval=1 if params.stop else _STREAM_INTERVAL,
                ),
            )
            for (text, token_ids), params, priority in zip(
                prompts, sampling_params, priorities, strict=True
            )
        ]
        with _progress_bar(len(requests), is_shown=use_tqdm) as on_finished:
            return self._run(self._finish_all(client, requests, on_finished))

    async def _finish_all(
        self, client: EngineClient, requests: Sequence[_Request], on_finished: _OnFinished
    ) -> list[RequestOutput]:
        async def finish(request: _Request) -> RequestOutput:
            return await self._finish_one(client, request, on_finished)

        return await finish_all(self.config, requests, finish)

    async def _finish_one(
        self, client: EngineClient, request: _Request, on_finished: _OnFinished
    ) -> RequestOutput:
        (prompt, params, of_engine), tokenizer = request, self._tokenizer
        prompt_token_ids = of_engine.prompt_token_ids
        outputs = OutputProcessor(
            tokenizer, params, prompt_token_ids, eos_token_ids=self.facts.eos_token_ids
        )
        choices = [WholeChoice() for _ in range(params.num_choices)]
        stream = client.generate(of_engine)
        async with aclosing(stream):
            async for delta in stream:
                shown = outputs.take(delta)
                choices[delta.index].take(shown)
                if shown.finish_reason is not None and delta.finish_reason is None:
                    stream.finish(delta.index)
        on_finished(len(prompt_token_ids), sum(len(c.token_ids) for c in choices))
        prompt_logprobs = outputs.prompt_logprobs or ()
        return RequestOutput(
            request_id=of_engine.request_id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=make_outputs(tokenizer, params, choices),
            num_cached_tokens=outputs.num_cached_tokens,
            prompt_logprobs=(
                None
                if params.prompt_logprobs is None
                else [None, *describe(tokenizer, prompt_logprobs)]
            ),
        )


def _list_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """One conversation is a list of messages, several are a list of such lists."""
    if messages and isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]
    return list(messages)  # type: ignore[arg-type]


@contextmanager
def _progress_bar(num_prompts: int, *, is_shown: bool) -> Iterator[_OnFinished]:
    """What to call for each finished prompt."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    started = time.monotonic()
    num_input_tokens = num_output_tokens = 0
    with tqdm(total=num_prompts, desc="Prompts", disable=not is_shown) as bar:

        def advance(num_prompt_tokens: int, num_tokens: int) -> None:
            nonlocal num_input_tokens, num_output_tokens
            num_input_tokens += num_prompt_tokens
            num_output_tokens += num_tokens
            elapsed = max(time.monotonic() - started, 1e-6)
            bar.set_postfix_str(
                f"input: {num_input_tokens / elapsed:.1f} tokens/s, "
                f"output: {num_output_tokens / elapsed:.1f} tokens/s",
                refresh=False,
            )
            bar.update()

        yield advance
