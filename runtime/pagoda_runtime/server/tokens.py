"""POST /tokenize and /detokenize: what a prompt is as tokens, and tokens as text."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagoda_runtime.errors import RequestError
from pagoda_runtime.server.answers import Detokenized, Tokenized
from pagoda_runtime.server.body import read_body, receive_body
from pagoda_runtime.server.errors import json_response
from pagoda_runtime.server.prompts import CHARACTERS_PER_TOKEN, tokenize
from pagoda_runtime.server.protocol import CompletionRequest
from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.streaming import while_connected
from pagoda_runtime.server.tokens_protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)
from pagoda_runtime.server.unsupported import verify_supported


def make_routes(state: ServerState) -> list[Route]:
    return [
        Route("/tokenize", partial(create_tokens, state), methods=["POST"]),
        Route("/detokenize", partial(create_text, state), methods=["POST"]),
    ]


async def create_tokens(state: ServerState, request: Request) -> Response:
    """The tokens that the same prompt or conversation has as a request for an answer."""
    raw = await receive_body(request)
    with state.admit():
        body = (await read_body(state, TokenizeRequest, raw)).root
        if isinstance(body, TokenizeChatRequest):
            state.warn_unknown(verify_supported(body))
            prompt: CompletionRequest | TokenizeChatRequest = body
        else:
            state.warn_unknown(body.model_extra or ())
            prompt = CompletionRequest.model_construct(
                prompt=[body.prompt], add_special_tokens=body.add_special_tokens
            )
        state.verify_model(body.model)
        async with while_connected(request.receive):
            (token_ids,) = await tokenize(state, prompt)
        ready, tokenizer = state.loaded()
        names = tokenizer.convert_ids_to_tokens(token_ids) if body.return_token_strs else None
        return json_response(Tokenized(len(token_ids), ready.max_model_len, token_ids, names))


async def create_text(state: ServerState, request: Request) -> Response:
    """The text of tokens, special ones included."""
    raw = await receive_body(request)
    with state.admit():
        body = await read_body(state, DetokenizeRequest, raw)
        state.warn_unknown(body.model_extra or ())
        state.verify_model(body.model)
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
        return json_response(Detokenized(text))
