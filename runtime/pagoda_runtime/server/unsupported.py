"""What of OpenAI's and vLLM's fields a route does not serve.

Three kinds of fields: those that a body of `protocol` declares; those of UNSUPPORTED, refused by
name unless they ask for nothing; and all others, accepted and reported once in the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagoda_runtime.errors import RequestError
from pagoda_runtime.server.protocol import ChatCompletionRequest, GenerationRequest

# Neutral values: what a client may send because it asks for nothing. None always is.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logprob_token_ids": ([],),
    "echo": (False,),
    "suffix": ("",),
    "spaces_between_special_tokens": (True,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "include_reasoning": (True, False),
    "thinking_token_budget": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "request_id": (),
    "return_token_ids": (False,),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
}
UNSUPPORTED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "tool_call_id": (),
    "audio": (),
    "refusal": (),
}


def _is_neutral(value: Any, neutral: Sequence[Any]) -> bool:
    # False == 0 in Python, but `logprobs: 0` asks for something and `logprobs: false` does not.
    return value is None or any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
    )


def _verify_supported(
    extra: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]], prefix: str = ""
) -> None:
    for name, value in extra.items():
        if name in table and not _is_neutral(value, table[name]):
            raise RequestError(
                f"{prefix}{name} is not supported here; leave it out.",
                param=f"{prefix}{name}",
            )


def verify_supported(body: GenerationRequest) -> list[str]:
    """The unknown fields of a body. Raises RequestError for a known one that is not served."""
    extra = body.model_extra or {}
    _verify_supported(extra, UNSUPPORTED)
    unknown = [name for name in extra if name not in UNSUPPORTED]
    if isinstance(body, ChatCompletionRequest):
        for index, message in enumerate(body.messages):
            in_message = message.model_extra or {}
            _verify_supported(in_message, UNSUPPORTED_IN_MESSAGE, f"messages[{index}].")
            unknown += [
                f"messages.{name}" for name in in_message if name not in UNSUPPORTED_IN_MESSAGE
            ]
    if body.stream_options is not None and not body.stream:
        raise RequestError(
            "stream_options is only allowed with `stream: true`.", param="stream_options"
        )
    return unknown
