"""POST /tokenize and /detokenize: what a prompt is as tokens, and tokens as text."""

from __future__ import annotations

from functools import partial

from starlette.routing import Route

from pagoda_runtime.errors import RequestError
from pagoda_runtime.server.answers import Detokenized, Tokenized
from pagoda_runtime.server.body import read_body
from pagoda_runtime.server.openai import make_answer
from pagoda_runtime.server.prompts import CHARACTERS_PER_TOKEN, tokenize
from pagoda_runtime.server.protocol import CompletionRequest
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.tokens_protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)


def make_routes(state: ServerState) -> list[Route]:
    """POST /tokenize and /detokenize."""

    async def create_tokens(body: TokenizeRequest, arrival: float) -> Tokenized:
        asked = body.root
        if isinstance(asked, TokenizeChatRequest):
            prompt: CompletionRequest | TokenizeChatRequest = asked
        else:
            prompt = CompletionRequest.model_construct(
                prompt=[asked.prompt], add_special_tokens=asked.add_special_tokens
            )
        (token_ids,) = await tokenize(state, prompt)
        ready, tokenizer = state.loaded()
        names = tokenizer.convert_ids_to_tokens(token_ids) if asked.return_token_strs else None
        return Tokenized(len(token_ids), ready.max_model_len, token_ids, names)

    async def create_text(body: DetokenizeRequest, arrival: float) -> Detokenized:
        ready, tokenizer = state.loaded()
        wrong = next((i for i in body.tokens if not 0 <= i < ready.vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"tokens has the id {wrong}; this model's go from 0 to {ready.vocab_size - 1}.",
                param="tokens",
            )
        text = await state.off_loop(
            CHARACTERS_PER_TOKEN * len(body.tokens),
            lambda: tokenizer.decode(body.tokens, skip_special_tokens=False),
        )
        return Detokenized(text)

    return [
        make_answer(state, "/tokenize", partial(read_body, state, TokenizeRequest), create_tokens),
        make_answer(
            state, "/detokenize", partial(read_body, state, DetokenizeRequest), create_text
        ),
    ]
