"""From what a client sent to token ids, without holding up the streams of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from pagoda_runtime.client.output_processor import Echo
from pagoda_runtime.errors import PromptTooLong, RequestError
from pagoda_runtime.ipc.limits import most_tokens, verify_fits
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.chat import choose_template, template_messages, template_variables
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.protocol import (
    AS_MANY_AS_FIT,
    CompletionRequest,
    GenerationRequest,
    Prompt,
)
from pagoda_runtime.server.state import PIECE_CHARACTERS, ServerState
from pagoda_runtime.tokenizer.detokenizer import IncrementalDetokenizer
from pagoda_runtime.tokenizer.tokenizer import Tokenizer

# About as many characters as a token has, to tell how long its decoding takes.
CHARACTERS_PER_TOKEN = 4
# The end of a prompt in which the mark of thoughts is looked for.
MAX_MARK_CHARACTERS = 256
# Tokens that a cut through a text may add or change.
CUT_TOKENS = 16


@dataclass(slots=True)
class EncodedPrompt:
    """The token ids of a prompt, and what its choices begin with."""

    token_ids: list[int]
    echo: Echo | None = None
    template: str | None = None
    """Of a chat."""
    text_end: str = ""
    """Of a chat: how its template ends."""


async def encode(
    state: ServerState, body: GenerationRequest, params: SamplingParams
) -> list[EncodedPrompt]:
    """The prompts of a request, in order.

    Raises: PromptTooLong; RequestError: a chat for a model without a template, or an echo of what
        the engine refuses.
    """
    encoder = _Encoder(state, body)
    prompts = await encoder.encode(body)
    if isinstance(body, CompletionRequest) and body.is_echo:
        ready, _ = state.loaded()
        for prompt in prompts:
            # What the engine refuses need not be decoded before.
            verify_fits(prompt.token_ids, params, ready)
        for given, prompt in zip(body.prompt, prompts, strict=True):
            prompt.echo = await encoder.make_echo(given, prompt.token_ids, params)
    return prompts


async def tokenize(state: ServerState, body: GenerationRequest) -> list[list[int]]:
    """The token ids of a request's prompts. Raises as `encode`."""
    return [prompt.token_ids for prompt in await _Encoder(state, body).encode(body)]


class _Encoder:
    """Tokenizes the prompts of one request, as far as their text is worth it."""

    def __init__(self, state: ServerState, body: GenerationRequest) -> None:
        ready, self.tokenizer = state.loaded()
        self.state = state
        self.most_tokens = most_tokens(ready)
        num_kept = body.truncate_prompt_tokens
        if num_kept == AS_MANY_AS_FIT:
            num_kept = max(1, self.most_tokens - max(1, body.asked_tokens or 1))
        # To keep more than fits is to keep all.
        self.num_kept = num_kept if num_kept is not None and num_kept < self.most_tokens else None
        """Tokens at a prompt's end that are used alone; None: all of them."""
        self.num_characters = 0
        """Of all prompts together, token ids counted as text."""
        is_chat = isinstance(body, ChatCompletionRequest)
        # A chat's template writes the special tokens itself.
        self.add_special_tokens = (
            not is_chat if body.add_special_tokens is None else body.add_special_tokens
        )

    async def encode(self, body: GenerationRequest) -> list[EncodedPrompt]:
        """The prompts of the request, in order."""
        if isinstance(body, ChatCompletionRequest):
            return [await self.encode_chat(body)]
        assert isinstance(body, CompletionRequest)
        return [EncodedPrompt(token_ids) for token_ids in await self.encode_prompts(body)]

    async def encode_prompts(self, body: CompletionRequest) -> list[list[int]]:
        prompts, suffix = body.prompt, body.suffix or ""
        self.num_characters = sum(
            len(prompt) * (1 if isinstance(prompt, str) else CHARACTERS_PER_TOKEN) + len(suffix)
            for prompt in prompts
        )
        for prompt in prompts:
            if suffix:
                verify_suffix(self.tokenizer, body, prompt)
            if isinstance(prompt, str):
                self._verify_characters(len(prompt) + len(suffix), "prompt")
        fill_in = (suffix and self.tokenizer.infill_format) or "{prefix}"
        return [
            await self._encode(fill_in.format(prefix=prompt, suffix=suffix), "prompt")
            if isinstance(prompt, str)
            else self._cut(prompt)
            for prompt in prompts
        ]

    async def encode_chat(self, request: ChatCompletionRequest) -> EncodedPrompt:
        num_characters = sum(message.num_characters for message in request.messages)
        self._verify_characters(num_characters, "messages")
        state, tokenizer = self.state, self.tokenizer
        template = choose_template(request, tokenizer, state.config, state.chat_template)
        continues = bool(request.continue_final_message)

        def render() -> str:
            return tokenizer.apply_chat_template(
                template_messages(request),
                template=template,
                add_generation_prompt=not continues and request.add_generation_prompt is not False,
                continue_final_message=continues,
                **template_variables(request),
            )

        text = await state.render(render)
        token_ids = await self._encode(text, "messages")
        return EncodedPrompt(token_ids, template=template, text_end=text[-MAX_MARK_CHARACTERS:])

    async def make_echo(
        self, prompt: Prompt, token_ids: Sequence[int], params: SamplingParams
    ) -> Echo:
        """The text is the prompt's own if it is one and stands in token_ids whole; else it is
        decoded."""
        tokenizer = self.tokenizer
        is_whole = self.num_kept is None or len(token_ids) < self.num_kept

        def make() -> Echo:
            if isinstance(prompt, str) and is_whole:
                offsets: list[int] = []
                if params.logprobs is not None:
                    offsets = tokenizer.text_offsets(prompt, self.add_special_tokens)
                return Echo(prompt, token_ids, offsets)
            # Neither stop strings nor stop ids mean anything in a prompt.
            plain = SamplingParams(skip_special_tokens=params.skip_special_tokens)
            detokenizer = IncrementalDetokenizer(tokenizer, plain)
            offsets, text = [], ""
            for token_id in token_ids:
                offsets.append(detokenizer.num_decoded)
                text += detokenizer.push((token_id,))
            text += detokenizer.finish()
            return Echo(text, token_ids, offsets)

        num_characters = CHARACTERS_PER_TOKEN * len(token_ids)
        return await self.state.off_loop(num_characters, make, self.num_characters)

    async def _encode(self, text: str, param: str) -> list[int]:
        tokenizer = self.tokenizer
        if self.num_kept is not None:
            text = text[-tokenizer.longest_token * (self.num_kept + CUT_TOKENS) :]
        elif len(text) > max(PIECE_CHARACTERS, CHARACTERS_PER_TOKEN * self.most_tokens):
            await self._verify_may_fit(text, param)
        ids = await self.state.off_loop(
            len(text),
            lambda: tokenizer.encode(text, add_special_tokens=self.add_special_tokens),
            self.num_characters,
        )
        return self._cut(ids)

    def _cut(self, token_ids: list[int]) -> list[int]:
        """The end of the prompt that is used."""
        return token_ids if self.num_kept is None else token_ids[-self.num_kept :]

    def _verify_characters(self, num_characters: int, param: str) -> None:
        """Raise PromptTooLong for a text that cannot fit, whatever its tokens are."""
        longest_token = self.tokenizer.longest_token
        most = longest_token * self.most_tokens
        if num_characters > most and self.num_kept is None:
            raise PromptTooLong(
                f"The prompt has {num_characters} characters; at most {most} can fit, because this "
                f"engine holds {self.most_tokens} tokens and the longest one has {longest_token} "
                "characters. Shorten the prompt, or set truncate_prompt_tokens.",
                param=param,
            )

    async def _verify_may_fit(self, text: str, param: str) -> None:
        """Raise PromptTooLong as soon as the first pieces of a long text have too many tokens.

        Between pieces others have their turn, and a client that leaves ends it.
        """
        num_tokens = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            ids = await self.state.off_loop(
                len(piece), partial(self.tokenizer.encode, piece, add_special_tokens=False)
            )
            num_tokens += len(ids) - CUT_TOKENS
            if num_tokens > self.most_tokens:
                raise PromptTooLong(
                    f"The prompt has {len(text)} characters, and the first {start + len(piece)} "
                    f"alone are more than {num_tokens} tokens; this engine holds "
                    f"{self.most_tokens}. Shorten the prompt, or set truncate_prompt_tokens.",
                    param=param,
                )


def verify_suffix(tokenizer: Tokenizer, body: CompletionRequest, prompt: Prompt) -> None:
    """Raise RequestError if the model has no markers for a suffix, or if they would not stand where
    they mean it."""
    if tokenizer.infill_format is None:
        raise RequestError(
            "suffix is not served: this model's tokenizer has no tokens to fill in the middle. "
            "Leave it out.",
            param="suffix",
        )
    if not isinstance(prompt, str):
        raise RequestError("suffix goes with a prompt of text, not of token ids.", param="prompt")
    for name in ("echo", "truncate_prompt_tokens"):
        if getattr(body, name):
            raise RequestError(
                f"{name} does not go with suffix; leave one of them out.", param=name
            )
