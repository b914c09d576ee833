"""From what a client sent to token ids, without holding up the streams of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from pagoda_runtime.client.output_processor import Echo
from pagoda_runtime.errors import PromptTooLong
from pagoda_runtime.ipc.limits import most_tokens, verify_fits
from pagoda_runtime.ipc.messages import EngineReady
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.protocol import (
    AS_MANY_AS_FIT,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Prompt,
)
from pagoda_runtime.server.sampling import is_echo
from pagoda_runtime.server.state import PIECE_CHARACTERS, ServerState, Tokenizer
from pagoda_runtime.tokenizer.detokenizer import IncrementalDetokenizer

# About as many characters as a token has, to tell how long its decoding takes.
CHARACTERS_PER_TOKEN = 4
# Tokens that a cut through a text may add or change.
CUT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class TextLimits:
    """How much text is worth tokenizing.

    Args:
        most_tokens: that this engine can hold of a sequence.
        num_kept: tokens at a prompt's end that are used alone; None: all of them.
        num_characters: of all prompts of the request together, token ids counted as text.
    """

    most_tokens: int
    num_kept: int | None
    num_characters: int

    @classmethod
    def of(cls, ready: EngineReady, body: GenerationRequest) -> TextLimits:
        num_characters = 0
        if isinstance(body, CompletionRequest):
            num_characters = sum(
                len(prompt) * (1 if isinstance(prompt, str) else CHARACTERS_PER_TOKEN)
                for prompt in body.prompt
            )
        most = most_tokens(ready)
        num_kept = body.truncate_prompt_tokens
        if num_kept == AS_MANY_AS_FIT:
            num_kept = max(1, most - max(1, body.asked_tokens or 1))
        # To keep more than fits is to keep all.
        kept = num_kept if num_kept is not None and num_kept < most else None
        return cls(most, kept, num_characters)

    def weight(self, num_characters: int) -> int:
        """The part of a prompt in the work of its request, as `off_loop` measures it: many short
        prompts are as much as a long one."""
        return max(num_characters, min(self.num_characters, PIECE_CHARACTERS))

    def cut(self, token_ids: list[int]) -> list[int]:
        """The end of the prompt that is used."""
        return token_ids if self.num_kept is None else token_ids[-self.num_kept :]

    def verify_characters(self, num_characters: int, longest_token: int, param: str) -> None:
        """Raise PromptTooLong for a text that cannot fit, whatever its tokens are."""
        most = longest_token * self.most_tokens
        if num_characters > most and self.num_kept is None:
            raise PromptTooLong(
                f"The prompt has {num_characters} characters; at most {most} can fit, because this "
                f"engine holds {self.most_tokens} tokens and the longest one has {longest_token} "
                "characters. Shorten the prompt, or set truncate_prompt_tokens.",
                param=param,
            )


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """The token ids of a prompt, and what its choices begin with."""

    token_ids: list[int]
    echo: Echo | None = None


async def encode(
    state: ServerState, body: GenerationRequest, params: SamplingParams
) -> list[EncodedPrompt]:
    """The prompts of a request, in order.

    Raises: PromptTooLong; RequestError: a chat for a model without a template, or an echo of what
        the engine refuses.
    """
    ready, tokenizer = state.loaded()
    limits = TextLimits.of(ready, body)
    if isinstance(body, ChatCompletionRequest):
        return [EncodedPrompt(await _encode_chat(state, tokenizer, body, limits))]
    assert isinstance(body, CompletionRequest)
    encoded = await _encode_prompts(state, tokenizer, body.prompt, limits)
    if not is_echo(body):
        return [EncodedPrompt(token_ids) for token_ids in encoded]
    for token_ids in encoded:
        # What the engine refuses need not be decoded before.
        verify_fits(token_ids, params, ready)
    return [
        EncodedPrompt(
            token_ids,
            await _make_echo(state, tokenizer, prompt, token_ids, params=params, limits=limits),
        )
        for prompt, token_ids in zip(body.prompt, encoded, strict=True)
    ]


async def _encode_prompts(
    state: ServerState, tokenizer: Tokenizer, prompts: Sequence[Prompt], limits: TextLimits
) -> list[list[int]]:
    for prompt in prompts:
        if isinstance(prompt, str):
            limits.verify_characters(len(prompt), tokenizer.longest_token, "prompt")
    return [
        await _encode(state, tokenizer, prompt, limits, add_special_tokens=True, param="prompt")
        if isinstance(prompt, str)
        else limits.cut(prompt)
        for prompt in prompts
    ]


async def _encode_chat(
    state: ServerState, tokenizer: Tokenizer, request: ChatCompletionRequest, limits: TextLimits
) -> list[int]:
    messages = [message.to_template() for message in request.messages]
    num_characters = sum(message.num_characters for message in request.messages)
    limits.verify_characters(num_characters, tokenizer.longest_token, "messages")
    text = await state.off_loop(
        num_characters,
        lambda: tokenizer.apply_chat_template(messages, template=state.chat_template),
    )
    # The template writes the special tokens itself.
    return await _encode(state, tokenizer, text, limits, add_special_tokens=False, param="messages")


async def _encode(
    state: ServerState,
    tokenizer: Tokenizer,
    text: str,
    limits: TextLimits,
    *,
    add_special_tokens: bool,
    param: str,
) -> list[int]:
    if limits.num_kept is not None:
        text = text[-tokenizer.longest_token * (limits.num_kept + CUT_TOKENS) :]
    elif len(text) > max(PIECE_CHARACTERS, CHARACTERS_PER_TOKEN * limits.most_tokens):
        await _verify_may_fit(state, tokenizer, text, limits.most_tokens, param)
    ids = await state.off_loop(
        limits.weight(len(text)),
        lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens),
    )
    return limits.cut(ids)


async def _verify_may_fit(
    state: ServerState, tokenizer: Tokenizer, text: str, most: int, param: str
) -> None:
    """Raise PromptTooLong as soon as the first pieces of a long text have too many tokens.

    Between pieces others have their turn, and a client that leaves ends it.
    """
    num_tokens = 0
    for start in range(0, len(text), PIECE_CHARACTERS):
        piece = text[start : start + PIECE_CHARACTERS]
        ids = await state.off_loop(
            len(piece), partial(tokenizer.encode, piece, add_special_tokens=False)
        )
        num_tokens += len(ids) - CUT_TOKENS
        if num_tokens > most:
            raise PromptTooLong(
                f"The prompt has {len(text)} characters, and the first {start + len(piece)} alone "
                f"are more than {num_tokens} tokens; this engine holds {most}. Shorten the prompt, "
                "or set truncate_prompt_tokens.",
                param=param,
            )


async def _make_echo(
    state: ServerState,
    tokenizer: Tokenizer,
    prompt: Prompt,
    token_ids: Sequence[int],
    *,
    params: SamplingParams,
    limits: TextLimits,
) -> Echo:
    """What choices begin with that repeat their prompt.

    The text is the prompt's own if it is one and stands in token_ids whole; else it is decoded.
    """
    is_whole = limits.num_kept is None or len(token_ids) < limits.num_kept

    def make() -> Echo:
        if isinstance(prompt, str) and is_whole:
            has_offsets = params.logprobs is not None
            return Echo(prompt, token_ids, tokenizer.text_offsets(prompt) if has_offsets else ())
        # Neither stop strings nor stop ids mean anything in a prompt.
        plain = SamplingParams(skip_special_tokens=params.skip_special_tokens)
        detokenizer = IncrementalDetokenizer(tokenizer, plain)
        offsets, text = [], ""
        for token_id in token_ids:
            offsets.append(detokenizer.num_decoded)
            text += detokenizer.push((token_id,))
        text += detokenizer.finish()
        return Echo(text, token_ids, offsets)

    return await state.off_loop(limits.weight(CHARACTERS_PER_TOKEN * len(token_ids)), make)
