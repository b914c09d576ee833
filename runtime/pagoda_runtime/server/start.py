"""From the body of a request to prompts that are in the engine."""

from __future__ import annotations

import asyncio
import time
import uuid
from functools import partial

import msgspec

from pagoda_runtime.client.output_processor import OutputProcessor, engine_params
from pagoda_runtime.errors import RequestError
from pagoda_runtime.ipc.limits import verify_max_tokens_fit
from pagoda_runtime.ipc.messages import EngineReady, EngineRequest
from pagoda_runtime.metrics import RequestClock
from pagoda_runtime.parsing.grammars import write_grammar
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.answer import Answer
from pagoda_runtime.server.chat import (
    ChatFormats,
    find_formats,
    find_thinking,
    make_layout,
    make_rules,
    special_marks,
)
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.generation import Generation, close_all
from pagoda_runtime.server.logprobs import LogprobsWriter
from pagoda_runtime.server.prompts import EncodedPrompt, encode
from pagoda_runtime.server.protocol import CompletionRequest, GenerationRequest
from pagoda_runtime.server.sampling import to_sampling_params
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.structured import Structure, find_structure
from pagoda_runtime.tokenizer.tokenizer import Tokenizer

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
    grammar = await state.structures.make_grammar(find_structure(body))
    # It tokenizes bad words.
    params = await state.off_loop(
        sum(map(len, body.bad_words or ())),
        lambda: to_sampling_params(body, tokenizer, ready.default_sampling, grammar),
    )
    num_prompts = len(body.prompt) if isinstance(body, CompletionRequest) else 1
    if num_prompts > 1:
        each = f" of {params.num_sequences} choices each" if params.num_sequences > 1 else ""
        num_sequences = num_prompts * params.num_sequences
        what = f"{num_prompts} prompts{each}, {num_sequences} sequences"
        state.verify_places(num_sequences, what, "prompt")
    _verify_num_ids(num_prompts, params)
    answer = _make_answer(state, body, tokenizer, params)
    try:
        with state.tokenizing(num_prompts) as enter:
            prompts = await encode(state, body, params)
            if isinstance(body, ChatCompletionRequest):
                await _plan_chat(state, answer, body, prompts[0])
            for number, prompt in enumerate(prompts):
                if number:
                    # Many prompts must not hold up the streams of others.
                    await asyncio.sleep(0)
                enter()
                request = _make_request(state, answer, prompt.token_ids)
                stream = state.engine.generate(request)
                outputs = _make_outputs(state, answer, prompt)
                max_tokens = request.sampling_params.max_tokens or 0
                clock = RequestClock(state.metrics, arrival, len(prompt.token_ids), max_tokens)
                if state.tracer is not None:
                    clock.on_finish = state.tracer.follow(answer, clock, outputs)
                is_scoring = body.is_echo and body.max_tokens == 0
                answer.generations.append(Generation(stream, clock, outputs, is_scoring))
                answer.num_prompt_tokens += len(prompt.token_ids)
    except BaseException:
        # If the engine refuses one prompt, it gets none of them.
        await close_all(answer.generations, "error")
        raise
    return answer


def _make_answer(
    state: ServerState, body: GenerationRequest, tokenizer: Tokenizer, params: SamplingParams
) -> Answer:
    kind = "chatcmpl" if isinstance(body, ChatCompletionRequest) else "cmpl"
    return Answer(
        request=body,
        params=params,
        id=f"{kind}-{uuid.uuid4().hex}",
        model=body.model or state.model_names[0],
        created=int(time.time()),
        logprobs=LogprobsWriter(
            tokenizer, num_top=body.num_logprobs, as_token_ids=bool(body.return_tokens_as_token_ids)
        ),
    )


async def _plan_chat(
    state: ServerState, answer: Answer, body: ChatCompletionRequest, prompt: EncodedPrompt
) -> None:
    """Set what the answer may hold and has to be."""
    _, tokenizer = state.loaded()
    config = state.config
    formats = find_formats(prompt.template, config.tool_call_parser, config.reasoning_parser)
    thinking = find_thinking(body, formats, prompt.text_end)
    answer.layout, answer.make_call_id = make_layout(body, formats, thinking), formats.make_call_id
    if answer.layout is not None:
        looked_for = ChatFormats(answer.layout.tools, answer.layout.reasoning)
        answer.shown_special_ids = frozenset(special_marks(looked_for, tokenizer).values())
    rules = make_rules(body, formats, thinking, answer.params.grammar)
    if rules is not None:
        param = "tools" if rules.tools else "thinking_token_budget"
        structure = Structure(
            param, partial(write_grammar, rules, special_marks(formats, tokenizer))
        )
        grammar = await state.structures.make_grammar(structure)
        answer.params = msgspec.structs.replace(answer.params, grammar=grammar)


def _make_request(state: ServerState, answer: Answer, prompt_token_ids: list[int]) -> EngineRequest:
    """The next prompt's, with the bound of its answer."""
    ready, _ = state.loaded()
    body = answer.request
    limit = _resolve_max_tokens(body, len(prompt_token_ids), ready)
    return state.engine.make_request(
        f"{answer.id}-{len(answer.generations)}",
        prompt_token_ids,
        engine_params(msgspec.structs.replace(answer.params, max_tokens=limit)),
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
    )


def _make_outputs(state: ServerState, answer: Answer, prompt: EncodedPrompt) -> OutputProcessor:
    ready, tokenizer = state.loaded()
    params = answer.params
    return OutputProcessor(
        tokenizer,
        params,
        prompt.token_ids,
        eos_token_ids=ready.eos_token_ids,
        first_index=len(answer.generations) * params.num_choices,
        shows_tokens=params.logprobs is not None,
        echo=prompt.echo,
        shown_special_ids=answer.shown_special_ids,
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


def _resolve_max_tokens(
    body: GenerationRequest, num_prompt_tokens: int, ready: EngineReady
) -> int | None:
    """How many tokens to generate; a default, None for no bound, never exceeds the context.

    Raises PromptTooLong if prompt and asked together do. A prompt that leaves no room at all is
    the engine's to refuse.
    """
    asked, name = body.asked_tokens, "max_tokens"
    default = ready.default_sampling.get("max_tokens")
    if isinstance(body, CompletionRequest):
        default = default or DEFAULT_COMPLETION_TOKENS
        if asked == 0 and body.echo:
            # Only the prompt is asked for, but its logprobs come with the first token.
            asked = 1
    elif isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        name = "max_completion_tokens"
    room = ready.max_model_len - num_prompt_tokens
    if asked is None:
        return max(1, room if default is None else min(int(default), room))
    if room >= 1:
        verify_max_tokens_fit(num_prompt_tokens, asked, ready, name)
    return asked
