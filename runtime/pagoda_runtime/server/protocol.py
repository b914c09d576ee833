"""The bodies of requests: names and types of the fields.

Fields of `SamplingParams` that a body has in the same form are made from it, and it verifies their
ranges. Fields that are not declared are looked up in `unsupported`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    create_model,
)

from pagoda_runtime.errors import shown
from pagoda_runtime.sampling_params import FIELDS, MAX_LOGIT_BIAS

P = TypeVar("P")
Prompt = str | list[int]
PromptInput = str | list[str] | list[int] | list[list[int]]
# As truncate_prompt_tokens: the context, less what is asked of the answer.
AS_MANY_AS_FIT = -1

# What a body does not have, or in another form.
_OTHER_FORM = {
    *("allowed_token_ids", "bad_words", "bad_words_token_ids", "logit_bias", "logprobs"),
    *("grammar", "max_tokens", "stop", "stop_token_ids"),
}
SAME_FORM = tuple(name for name in FIELDS if name not in _OTHER_FORM)
MAX_STOP_TOKEN_IDS = 1024


def _verify_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode; a surrogate stands alone") from None
    return text


# Whole numbers that fit a message to the engine; tighter ranges are verified with the others.
Small = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Text = Annotated[str, AfterValidator(_verify_text)]
# Each stop string is looked for in the text of each token.
Phrase = Annotated[str, Field(max_length=1024), AfterValidator(_verify_text)]
# The first wrong entry ends the list: an error for each of a million costs more than the list.
TokenIds = Annotated[list[Small], Field(fail_fast=True)]
Salt = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_verify_text)]


class Body(BaseModel, strict=True, extra="allow"):
    """What every body has. Fields that are not declared are kept, for `unsupported`."""

    model: Text | None = None


class Part(BaseModel, strict=True, extra="ignore"):
    """An object in a body. What it has beside its fields changes nothing."""


class OpenPart(Part, extra="allow"):
    """An object whose other fields are kept."""


def tag_of_content(content: Any) -> str:
    return "list[part]" if isinstance(content, list) else "str"


# By the kind of the value, so that an error is of the one form that was sent.
TextOr = Annotated[
    Annotated[Text, Tag("str")] | Annotated[list[P], Field(fail_fast=True), Tag("list[part]")],
    Discriminator(tag_of_content),
]


def only(what: str, *kinds: str, default: str | None = None) -> BeforeValidator:
    """Takes an object if its type, or else the default, is one of these kinds."""

    def verify(part: Any) -> Any:
        if isinstance(part, dict) and part.get("type", default) not in kinds:
            raise ValueError(f"{what} only; the type of this one is {shown(part.get('type'))}")
        return part

    return BeforeValidator(verify)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int}


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


def _verify_logit_bias(value: dict[str, float]) -> dict[str, float]:
    for key in value:
        if not (key.isascii() and key.isdecimal() and key == str(int(key))):
            raise ValueError(f'its keys must be token ids such as "42"; one is {key[:20]!r}')
    return value


def _verify_num_biases(value: Any) -> Any:
    # Before each of them is looked at.
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"{len(value)} entries; at most {MAX_LOGIT_BIAS} fit")
    return value


LogitBias = Annotated[
    dict[str, float], AfterValidator(_verify_logit_bias), BeforeValidator(_verify_num_biases)
]


def _verify_truncation(value: int) -> int:
    if value < 1 and value != AS_MANY_AS_FIT:
        raise ValueError(f"must be at least 1, or {AS_MANY_AS_FIT} for as many tokens as fit")
    return value


Truncation = Annotated[Small, AfterValidator(_verify_truncation)]
Priority = Annotated[int, Field(ge=-1000, le=1000)]


class JsonSchema(OpenPart):
    """A schema by its name; strict or not, an answer fits it."""

    name: str | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Part, extra="forbid"):
    """The form of an answer, as OpenAI's API has it, and structural tags as vLLM's."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(Part, extra="forbid"):
    """The form of an answer, as vLLM's API has it: one of json to structural_tag."""

    json_schema: Annotated[dict[str, Any] | bool | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Text | None = None
    choice: list[Text] | None = None
    grammar: Text | None = None
    structural_tag: dict[str, Any] | str | None = None
    whitespace_pattern: Text | None = None
    disable_any_whitespace: bool | None = None


class StreamOptions(OpenPart):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


if TYPE_CHECKING:

    class SamplingFields(Body):
        """What type checkers know: those that are read by name."""

        prompt_logprobs: int | None
else:
    # Their ranges are told here; SamplingParams verifies them.
    SamplingFields = create_model(
        "SamplingFields",
        __base__=Body,
        **{
            name: (FIELDS[name].type | None, Field(default=None, description=FIELDS[name].expected))
            for name in SAME_FORM
        },
    )


class GenerationRequest(SamplingFields):
    """The fields that completions and chat completions share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Small | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[Phrase], Field(fail_fast=True)] | None = None
    stop: Phrase | Annotated[list[Phrase], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Truncation | None = None
    priority: Priority | None = None
    cache_salt: Salt | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_json_object: bool | None = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    guided_grammar: Text | None = None
    guided_structural_tag: dict[str, Any] | str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def asked_tokens(self) -> int | None:
        """The bound of each choice, if it has one of the request."""
        return self.max_tokens

    @property
    def is_echo(self) -> bool:
        """Whether each choice begins with the prompt."""
        return False

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        options = self.stream_options
        return self.includes_usage and bool(options and options.continuous_usage_stats)

    @property
    def num_logprobs(self) -> int | None:
        """The likeliest tokens that are shown beside each token; None: no logprobs at all."""
        raise NotImplementedError


Prompts = Annotated[
    list[Prompt], PlainValidator(_verify_prompt, json_schema_input_type=PromptInput)
]


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Prompts
    suffix: Text | None = None
    logprobs: Small | None = None
    echo: bool | None = None

    @property
    def is_echo(self) -> bool:
        return bool(self.echo)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
