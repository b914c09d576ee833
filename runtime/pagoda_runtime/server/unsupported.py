"""What of OpenAI's, vLLM's and SGLang's fields a route does not serve.

Three kinds of fields: those that a body declares; those of the tables here, refused
by name unless they ask for nothing; and all others, accepted and reported once in the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagoda_runtime.errors import RequestError
from pagoda_runtime.server.chat_checks import verify_chat
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.pooling_protocol import PoolingRequest
from pagoda_runtime.server.protocol import Body, GenerationRequest
from pagoda_runtime.server.responses_protocol import ResponsesRequest

# What a client may send because it asks for nothing. null is always such a value.
EMPTY: tuple[Any, ...] = (False, "", [], {})
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # The form of the answer.
    **dict.fromkeys(("ebnf", "format", "grammar", "json_schema", "regex", "structural_tag"), EMPTY),
    **dict.fromkeys(("stop_regex", "suffix"), EMPTY),
    "modalities": (*EMPTY, ["text"]),
    "verbosity": (*EMPTY, "medium"),
    "spaces_between_special_tokens": (True,),
    # What is told beside it.
    **dict.fromkeys(("audio", "echo", "logprob_token_ids", "return_hidden_states"), EMPTY),
    **dict.fromkeys(("request_id", "return_token_ids", "web_search_options"), EMPTY),
    "top_logprobs": (*EMPTY, 0),
    # Tools and reasoning; chats declare most of it.
    **dict.fromkeys(("functions", "tools", "thinking_token_budget"), EMPTY),
    "function_call": (*EMPTY, "none", "auto"),
    "tool_choice": (*EMPTY, "none", "auto"),
    "parallel_tool_calls": (True, False),
    "include_reasoning": (True, False),
    "reasoning_effort": (*EMPTY, "none"),
    # The prompt.
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "documents", "images"), EMPTY),
    **dict.fromkeys(("continue_final_message", "image_data", "input_ids", "prediction"), EMPTY),
    **dict.fromkeys(("media_io_kwargs", "mm_processor_kwargs", "prompt_embeds"), EMPTY),
    "add_generation_prompt": (True,),
    "truncation_side": (*EMPTY, "left"),
    # The model and its draws.
    **dict.fromkeys(("custom_logit_processor", "custom_params", "logits_processors"), EMPTY),
    **dict.fromkeys(("kv_transfer_params", "lora_path", "repetition_detection"), EMPTY),
    **dict.fromkeys(("no_stop_trim", "vllm_xargs"), EMPTY),
}
UNSUPPORTED_IN_POOLING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "documents", "images"), EMPTY),
    **dict.fromkeys(("instruction", "lora_path", "max_tokens_per_doc", "messages", "mm"), EMPTY),
    **dict.fromkeys(("rank_fields", "return_token_ids", "task", "titles"), EMPTY),
    "add_special_tokens": (True,),
    "embed_dtype": (*EMPTY, "float32"),
    "embedding_types": (*EMPTY, ["float"]),
    "endianness": (*EMPTY, "native", "little"),
    "truncation_side": (*EMPTY, "right"),
}
UNSUPPORTED_IN_MESSAGE = dict.fromkeys(
    ("audio", "function_call", "images", "prefix", "refusal"), EMPTY
)

UNSUPPORTED_IN_RESPONSES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("conversation", "prompt", "context_management", "moderation"), ([], {})),
    "max_tool_calls": (),
    "include": ([],),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
}


TABLES: tuple[tuple[type[Body], dict[str, tuple[Any, ...]]], ...] = (
    (GenerationRequest, UNSUPPORTED),
    (PoolingRequest, UNSUPPORTED_IN_POOLING),
    (ResponsesRequest, UNSUPPORTED_IN_RESPONSES),
    (Body, {}),
)


def verify_supported(body: Body) -> list[str]:
    """The unknown fields of a body.

    Raises: RequestError: known ones are not served (it names all of them), the fields of a chat
        contradict each other, or stream_options came without a stream.
    """
    table = next(table for kind, table in TABLES if isinstance(body, kind))
    refused, unknown = _sort_out(body.model_extra or {}, table)
    for index, message in enumerate(
        body.messages if isinstance(body, ChatCompletionRequest) else ()
    ):
        others = _sort_out(message.model_extra or {}, UNSUPPORTED_IN_MESSAGE)
        refused += [f"messages[{index}].{name}" for name in others[0]]
        unknown += [f"messages.{name}" for name in others[1]]
    _refuse(refused)
    if isinstance(body, ChatCompletionRequest):
        verify_chat(body)
    if isinstance(body, GenerationRequest) and body.stream_options is not None and not body.stream:
        raise RequestError(
            "stream_options is only allowed with `stream: true`.", param="stream_options"
        )
    return unknown


def _refuse(names: Sequence[str]) -> None:
    if names:
        *first, last = names
        are = f"{', '.join(first)} and {last} are" if first else f"{last} is"
        them = "them" if first else "it"
        raise RequestError(f"{are} not supported here; leave {them} out.", param=names[0])


def _sort_out(
    extra: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]]
) -> tuple[list[str], list[str]]:
    """The names that are refused, and those that nobody knows."""
    refused = [
        name for name in extra if name in table and not _is_neutral(extra[name], table[name])
    ]
    return refused, [name for name in extra if name not in table]


def _is_neutral(value: Any, neutral: Sequence[Any]) -> bool:
    # False == 0 in Python, but `top_k: 0` is a number and `top_k: false` is not.
    return value is None or any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
    )
