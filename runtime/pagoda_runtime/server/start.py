"""From the body of a request to prompts that are in the engine."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pagoda_runtime.client.outputs import engine_params
from pagoda_runtime.errors import RequestError
from pagoda_runtime.ipc.limits import verify_fits
from pagoda_runtime.ipc.messages import EngineReady
from pagoda_runtime.metrics import RequestClock
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.answer import Answer
from pagoda_runtime.server.choice import ChoiceText, Echo
from pagoda_runtime.server.generation import Generation, close_all
from pagoda_runtime.server.logprobs import LogprobsWriter
from pagoda_runtime.server.prompts import (
    TextLimits,
    encode_chat,
    encode_prompts,
    make_echo,
    resolve_max_tokens,
)
from pagoda_runtime.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from pagoda_runtime.server.sampling import is_echo, to_sampling_params
from pagoda_runtime.server.state import ServerState, Tokenizer
from pagoda_runtime.tokenizer.detokenizer import IncrementalDetokenizer

# OpenAI's default for completions; a chat may use the rest of the context. The model's comes first.
DEFAULT_COMPLETION_TOKENS = 16
# Beside the prompts of a request; several megabytes of messages.
MAX_TOKEN_IDS = 1_048_576


async def start(state: ServerState, body: GenerationRequest, arrival: float) -> Answer:
    """Tokenize and hand over to the engine.

    Args:
        arrival: time.monotonic() at which the request came.
    Raises: RequestError, QueueFull, EngineDead.
    """
    ready, tokenizer = state.loaded()
    # It tokenizes bad words.
    params = await state.off_loop(
        sum(map(len, body.bad_words or ())),
        lambda: to_sampling_params(body, tokenizer, ready.default_sampling),
    )
    num_prompts = len(body.prompt) if isinstance(body, CompletionRequest) else 1
    _verify_num_sequences(state, num_prompts, params)
    _verify_num_ids(num_prompts, params)
    kind = "chatcmpl" if isinstance(body, ChatCompletionRequest) else "cmpl"
    plan = _Plan(state, body, tokenizer, params, ready, arrival, f"{kind}-{uuid.uuid4().hex}")
    generations: list[Generation] = []
    try:
        with state.tokenizing(num_prompts) as enter:
            prompts = await plan.encode()
            echoes = await plan.make_echoes(prompts)
            for number, (prompt, echo) in enumerate(zip(prompts, echoes, strict=True)):
                if number:
                    # Many prompts must not hold up the streams of others.
                    await asyncio.sleep(0)
                enter()
                generations.append(plan.start_prompt(number, prompt, echo))
    except BaseException:
        # If the engine refuses one prompt, it gets none of them.
        await close_all(generations, "error")
        raise
    return Answer(
        request=body,
        id=plan.id,
        model=body.model or state.model_names[0],
        created=int(time.time()),
        generations=generations,
        num_prompt_tokens=sum(map(len, prompts)),
        num_generated=plan.num_choices,
        num_shown=params.n,
        logprobs=LogprobsWriter(
            tokenizer,
            num_top=body.num_logprobs or 0,
            as_token_ids=bool(body.return_tokens_as_token_ids),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the prompts of one request share."""

    state: ServerState
    body: GenerationRequest
    tokenizer: Tokenizer
    params: SamplingParams
    ready: EngineReady
    arrival: float
    id: str

    @property
    def num_choices(self) -> int:
        """Of each prompt; of beams only those come from the engine that are returned."""
        return self.params.n if self.params.use_beam_search else self.params.num_sequences

    async def encode(self) -> list[list[int]]:
        """The token ids of each prompt."""
        state, body, limits = self.state, self.body, TextLimits.of(self.ready, self.body)
        if isinstance(body, ChatCompletionRequest):
            return [await encode_chat(state, self.tokenizer, body, limits)]
        assert isinstance(body, CompletionRequest)
        return await encode_prompts(state, self.tokenizer, body.prompt, limits)

    async def make_echoes(self, prompts: Sequence[Sequence[int]]) -> list[Echo | None]:
        """What the choices of each prompt begin with."""
        state, body, params = self.state, self.body, self.params
        if not is_echo(body):
            return [None] * len(prompts)
        assert isinstance(body, CompletionRequest)
        for token_ids in prompts:
            # What the engine refuses need not be decoded before.
            verify_fits(token_ids, params, self.ready)
        limits = TextLimits.of(self.ready, body)
        return [
            await make_echo(state, self.tokenizer, given, token_ids, params=params, limits=limits)
            for given, token_ids in zip(body.prompt, prompts, strict=True)
        ]

    def start_prompt(self, number: int, prompt: Sequence[int], echo: Echo | None) -> Generation:
        """Hand one prompt to the engine."""
        body, params = self.body, self.params
        limited = _limit(body, params, len(prompt), self.ready)
        stream = self.state.engine.generate(
            f"{self.id}-{number}",
            prompt,
            engine_params(limited),
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
        )
        choices = [
            ChoiceText(
                IncrementalDetokenizer(
                    self.tokenizer,
                    params,
                    prompt_token_ids=prompt,
                    eos_token_ids=self.ready.eos_token_ids,
                ),
                has_logprobs=params.logprobs is not None,
                echo=echo,
            )
            for _ in range(self.num_choices)
        ]
        clock = RequestClock(
            self.state.metrics,
            self.arrival,
            num_prompt_tokens=len(prompt),
            max_tokens=limited.max_tokens or 0,
        )
        return Generation(
            stream,
            choices,
            clock,
            first_index=number * self.num_choices,
            is_scoring=is_echo(body) and body.max_tokens == 0,
        )


def _verify_num_sequences(state: ServerState, num_prompts: int, params: SamplingParams) -> None:
    """Raise RequestError if the choices of all prompts are more than this server ever holds."""
    engine_config = state.config.engine
    slots, places = engine_config.max_num_seqs, engine_config.max_num_waiting
    num_sequences = num_prompts * params.num_sequences
    if num_prompts > 1 and num_sequences > slots + places:
        choices = f" of {params.num_sequences} choices each" if params.num_sequences > 1 else ""
        raise RequestError(
            f"The request has {num_prompts} prompts{choices}, {num_sequences} sequences; this "
            f"server takes at most {slots + places} at once: it runs {slots} (--max-num-seqs) and "
            f"lets {places} wait (--max-num-waiting). Send fewer in a request.",
            param="prompt",
        )


def _verify_num_ids(num_prompts: int, params: SamplingParams) -> None:
    """Raise RequestError if what is told to the engine with each prompt is too much in sum."""
    num_ids = len(params.allowed_token_ids or ()) + len(params.stop_token_ids)
    num_ids += sum(map(len, params.bad_words_token_ids))
    if num_prompts * num_ids > MAX_TOKEN_IDS:
        raise RequestError(
            f"allowed_token_ids, stop_token_ids and bad_words have {num_ids} tokens, which go with "
            f"each of {num_prompts} prompts; {MAX_TOKEN_IDS} fit in sum. Send fewer in a request.",
            param="prompt" if num_prompts > 1 else None,
        )


def _limit(
    body: GenerationRequest, params: SamplingParams, num_prompt_tokens: int, ready: EngineReady
) -> SamplingParams:
    """The parameters with the bound of one prompt's answer. Raises PromptTooLong."""
    max_tokens, name = body.asked_tokens, "max_tokens"
    of_model = ready.default_sampling.get("max_tokens")
    default = None if of_model is None else int(of_model)
    if isinstance(body, CompletionRequest):
        default = default or DEFAULT_COMPLETION_TOKENS
        if max_tokens == 0 and body.echo:
            # Only the prompt is asked for, but its logprobs come with the first token.
            max_tokens = 1
    elif isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        name = "max_completion_tokens"
    limit = resolve_max_tokens(
        max_tokens, default, num_prompt_tokens, ready.max_model_len, param=name
    )
    return msgspec.structs.replace(params, max_tokens=limit)
