"""The bodies of requests, and what of OpenAI's and vLLM's fields this engine does not serve.

Three kinds of fields: those declared here; those of UNSUPPORTED, refused by name unless they ask
for nothing; and all others, accepted and reported once in the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from pagoda_runtime.errors import RequestError
from pagoda_runtime.sampling_params import SamplingParams

Prompt = str | list[int]


def _verify_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode; a surrogate stands alone") from None
    return text


# Whole numbers that fit a message to the engine; tighter ranges are verified with the others.
Small = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Text = Annotated[str, AfterValidator(_verify_text)]


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _verify_prompt(value: Any) -> list[Prompt]:
    """One prompt or several, as a list of strings and lists of token ids."""
    if isinstance(value, str):
        prompts: list[Prompt] = [value]
    elif isinstance(value, list) and value and _is_token_ids(value):
        prompts = [value]
    elif (
        isinstance(value, list)
        and value
        and (all(isinstance(item, str) for item in value) or all(map(_is_token_ids, value)))
    ):
        prompts = value
    else:
        raise ValueError(
            "must be a string, a list of strings, a list of token ids, or a list of such lists, "
            "and not an empty list"
        )
    for prompt in prompts:
        if isinstance(prompt, str):
            _verify_text(prompt)
    return prompts


class StreamOptions(BaseModel):
    """What a stream tells beside its text."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(BaseModel):
    """The fields that completions and chat completions share."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Small | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: list[Small] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        options = self.stream_options
        return self.includes_usage and bool(options and options.continuous_usage_stats)

    def to_sampling_params(
        self, max_tokens: int | None, defaults: Mapping[str, float | int]
    ) -> SamplingParams:
        """What the engine is asked for; `defaults` are the checkpoint's. Raises RequestError."""
        stop = self.stop if self.stop is not None else []
        chosen = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        values = {**defaults, **{name: v for name, v in chosen.items() if v is not None}}
        params = SamplingParams(
            temperature=values.get("temperature", 1.0),
            top_p=values.get("top_p", 1.0),
            top_k=int(values.get("top_k", 0)),
            seed=self.seed,
            max_tokens=max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            skip_special_tokens=self.skip_special_tokens is not False,
        )
        params.verify()
        return params


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[Prompt], PlainValidator(_verify_prompt)]


class TextPart(BaseModel):
    """The only kind of content part that a text model takes."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None

    def to_template(self) -> dict[str, str]:
        """The message as chat templates know it: a developer is a system, content is one text."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None


# Neutral values: what a client may send because it asks for nothing. None always is.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logprob_token_ids": ([],),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
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
    "priority": (0,),
    "request_id": (),
    "cache_salt": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
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
                f"{prefix}{name} is not supported by this server; leave it out.",
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
