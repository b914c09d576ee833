"""From what a client sent to token ids, without holding up the streams of others."""

from __future__ import annotations

from collections.abc import Sequence

from pagoda_runtime.engine.detokenizer import IncrementalDetokenizer
from pagoda_runtime.errors import PromptTooLong
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.choice import Echo
from pagoda_runtime.server.protocol import ChatCompletionRequest, Prompt
from pagoda_runtime.server.state import ServerState, Tokenizer

# About as many characters as a token has, to tell how long its decoding takes.
CHARACTERS_PER_TOKEN = 4


async def encode_prompts(
    state: ServerState, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> list[list[int]]:
    """The token ids of each prompt, in order."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            encoded.append(await _encode(state, tokenizer, prompt, add_special_tokens=True))
        else:
            encoded.append(prompt)
    return encoded


async def encode_chat(
    state: ServerState, tokenizer: Tokenizer, request: ChatCompletionRequest
) -> list[int]:
    """The token ids of a conversation. Raises RequestError if the model has no chat template."""
    messages = [message.to_template() for message in request.messages]
    text = await state.off_loop(
        sum(message.num_characters for message in request.messages),
        lambda: tokenizer.apply_chat_template(messages, template=state.chat_template),
    )
    # The template writes the special tokens itself.
    return await _encode(state, tokenizer, text, add_special_tokens=False)


async def _encode(
    state: ServerState, tokenizer: Tokenizer, text: str, *, add_special_tokens: bool
) -> list[int]:
    return await state.off_loop(
        len(text), lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens)
    )


def resolve_max_tokens(
    asked: int | None,
    default: int | None,
    num_prompt_tokens: int,
    max_model_len: int,
    *,
    param: str,
) -> int | None:
    """How many tokens to generate; a default, None for no bound, never exceeds the context.

    Raises PromptTooLong if prompt and asked together do. A prompt that leaves no room at all is
    the engine's to refuse.
    """
    room = max_model_len - num_prompt_tokens
    if asked is None:
        return max(1, room if default is None else min(default, room))
    if room >= 1 and asked > room:
        raise PromptTooLong(
            f"The prompt has {num_prompt_tokens} tokens and {param} is {asked}, together "
            f"{num_prompt_tokens + asked}; this model's context is {max_model_len} tokens. Lower "
            f"{param} to at most {room}, or shorten the prompt.",
            param=param,
        )
    return asked


async def make_echo(
    state: ServerState,
    tokenizer: Tokenizer,
    prompt: Prompt,
    token_ids: Sequence[int],
    *,
    params: SamplingParams,
    is_whole: bool,
) -> Echo:
    """What choices begin with that repeat their prompt.

    The text is the prompt's own if it is one and stands in token_ids whole; else it is decoded.
    """

    def make() -> Echo:
        # Neither stop strings nor stop ids mean anything in a prompt.
        plain = SamplingParams(skip_special_tokens=params.skip_special_tokens)
        detokenizer = IncrementalDetokenizer(tokenizer, plain)
        offsets, text = [], ""
        for token_id in token_ids:
            offsets.append(detokenizer.num_decoded)
            text += detokenizer.push((token_id,))
        text += detokenizer.finish()
        return Echo(prompt if isinstance(prompt, str) and is_whole else text, token_ids, offsets)

    return await state.off_loop(CHARACTERS_PER_TOKEN * len(token_ids), make)
