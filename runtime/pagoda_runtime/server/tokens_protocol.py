"""The bodies of requests for tokens and for their text."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, RootModel, Tag

from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.protocol import Body, Text, TokenIds


class TokenizePromptRequest(Body):
    """The body of POST /tokenize for a prompt."""

    prompt: Text
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatCompletionRequest):
    """The body of POST /tokenize for a conversation: all fields of a chat, with the same prompt."""

    return_token_strs: bool | None = None


def _tag_of_prompt(body: Any) -> str:
    return "[chat]" if isinstance(body, dict) and "messages" in body else "[prompt]"


class TokenizeRequest(
    RootModel[
        Annotated[
            Annotated[TokenizePromptRequest, Tag("[prompt]")]
            | Annotated[TokenizeChatRequest, Tag("[chat]")],
            Discriminator(_tag_of_prompt),
        ]
    ]
):
    """The body of POST /tokenize: a prompt or a conversation."""


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    tokens: TokenIds
