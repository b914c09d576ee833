"""One answer: its choices as they come, as a stream of chunks or in one piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from msgspec import UNSET, Struct
from msgspec.json import encode

from pagoda_runtime.client.output_processor import TextDelta, WholeChoice, pick_best
from pagoda_runtime.parsing.deltas import (
    CallArguments,
    CallStart,
    ContentDelta,
    Delta,
    ReasoningDelta,
    WholeMessage,
)
from pagoda_runtime.parsing.parser import AnswerParser, Layout
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server import answers
from pagoda_runtime.server.answers import ChatFinishReason
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest
from pagoda_runtime.server.generation import Generation, merge
from pagoda_runtime.server.logprobs import LogprobsWriter
from pagoda_runtime.server.protocol import GenerationRequest


@dataclass(slots=True)
class Answer:
    """One answer in the making: its identity, its prompts and what was counted so far."""

    request: GenerationRequest
    params: SamplingParams
    id: str
    model: str
    created: int
    logprobs: LogprobsWriter
    layout: Layout | None = None
    """What its text consists of; None: of content alone."""
    make_call_id: Callable[[], str] = str
    shown_special_ids: frozenset[int] = frozenset()
    """Special tokens that give text, because they are marks of the layout."""
    generations: list[Generation] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_reasoning_tokens: int = 0

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatCompletionRequest)

    @property
    def shows_reasoning(self) -> bool:
        request = self.request
        return (
            not isinstance(request, ChatCompletionRequest) or request.include_reasoning is not False
        )

    def usage(self) -> answers.Usage:
        """Tokens so far, over all choices, those included that are not shown."""
        prompt, completion = self.num_prompt_tokens, self.num_tokens
        cached = sum(generation.outputs.num_cached_tokens for generation in self.generations)
        has_thoughts = self.layout is not None and self.layout.reasoning is not None
        return answers.Usage(
            prompt,
            completion,
            prompt + completion,
            answers.PromptTokensDetails(cached),
            answers.CompletionTokensDetails(self.num_reasoning_tokens) if has_thoughts else UNSET,
        )


class TypedDelta(Struct, frozen=True):
    """What came for one choice, and what it is."""

    plain: TextDelta
    parts: Sequence[Delta]
    finish_reason: ChatFinishReason | None


async def typed_deltas(answer: Answer) -> AsyncGenerator[TypedDelta, None]:
    """The answer as it comes, with what its text is; tokens are counted. Whoever closes it ends the
    prompts in the engine."""
    layout, parsers = answer.layout, dict[int, AnswerParser]()
    async with aclosing(merge(answer.generations)) as deltas:
        async for delta in deltas:
            answer.num_tokens += len(delta.token_ids)
            if layout is None:
                parts: list[Delta] = [ContentDelta(delta.text)] if delta.text else []
                yield TypedDelta(delta, parts, delta.finish_reason)
                continue
            parser = parsers.get(delta.index)
            if parser is None:
                parser = parsers[delta.index] = AnswerParser(layout, answer.make_call_id)
            parts = parser.push(delta.text)
            answer.num_reasoning_tokens += len(delta.token_ids) * parser.is_reasoning
            reason: ChatFinishReason | None = delta.finish_reason
            if reason is not None:
                parts += parser.finish(is_cut=reason != "stop")
                reason = "tool_calls" if reason == "stop" and parser.has_calls else reason
            if not answer.shows_reasoning:
                parts = [part for part in parts if not isinstance(part, ReasoningDelta)]
            yield TypedDelta(delta, parts, reason)


async def stream(answer: Answer) -> AsyncGenerator[bytes, None]:
    """The chunks of an answer, as server-sent events."""
    request, write = answer.request, ChunkWriter(answer).write
    has_usage = request.has_continuous_usage
    if answer.is_chat:
        for index in range(len(answer.generations) * answer.params.n):
            first = answers.ChatChunkChoice(index, answers.Delta("assistant", ""), None, None)
            yield write(first, answer.usage() if has_usage else None)
    async with aclosing(typed_deltas(answer)) as deltas:
        async for delta in deltas:
            if delta.parts or delta.finish_reason is not None or has_usage or delta.plain.shown:
                choice = _write_choice(answer, delta)
                yield write(choice, answer.usage() if has_usage else None)
    if request.includes_usage:
        yield write(None, answer.usage())


class ChunkWriter:
    """Writes the chunks of one answer as events; what they have in common is encoded once."""

    def __init__(self, answer: Answer) -> None:
        chunk_class = answers.ChatCompletionChunk if answer.is_chat else answers.CompletionChunk
        chunk = chunk_class(answer.id, answer.created, answer.model, choices=[])
        self._head = b"data: " + encode(chunk).removesuffix(b"]}")
        # As OpenAI has it: null in every chunk but the last, where usage was asked for.
        self._no_usage = b',"usage":null' if answer.request.includes_usage else b""

    def write(
        self,
        choice: answers.ChatChunkChoice | answers.CompletionChunkChoice | None,
        usage: answers.Usage | None,
    ) -> bytes:
        """A chunk; None for the choice: the last one, which has none."""
        return b"%s%s]%s}\n\n" % (
            self._head,
            b"" if choice is None else encode(choice),
            self._no_usage if usage is None else b',"usage":' + encode(usage),
        )


def _write_delta(parts: Sequence[Delta]) -> answers.Delta:
    """All parts in one chunk."""
    content = reasoning = ""
    calls: dict[int, answers.ToolCallDelta] = {}
    for part in parts:
        match part:
            case ContentDelta(text):
                content += text
            case ReasoningDelta(text):
                reasoning += text
            case CallStart(index, call_id, name):
                begun = answers.FunctionCallDelta("", name)
                calls[index] = answers.ToolCallDelta(index, begun, call_id, "function")
            case CallArguments(index, text):
                if index not in calls:
                    calls[index] = answers.ToolCallDelta(index, answers.FunctionCallDelta(""))
                calls[index].function.arguments += text
    return answers.Delta(UNSET, content or UNSET, reasoning or UNSET, list(calls.values()) or UNSET)


def _write_choice(
    answer: Answer, delta: TypedDelta
) -> answers.ChatChunkChoice | answers.CompletionChunkChoice:
    plain, logprobs = delta.plain, answer.logprobs
    stop_reason = UNSET if delta.finish_reason is None else plain.stop_reason
    if answer.is_chat:
        message, shown = _write_delta(delta.parts), logprobs.chat(plain.shown)
        return answers.ChatChunkChoice(
            plain.index, message, shown, delta.finish_reason, stop_reason
        )
    of_text = logprobs.completion(plain.shown)
    return answers.CompletionChunkChoice(
        plain.index, plain.text, of_text, plain.finish_reason, stop_reason
    )


class TypedChoice(WholeChoice):
    """A choice in one piece, with what its text is."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Delta] = []
        self.chat_finish_reason: ChatFinishReason = "length"

    def take_typed(self, delta: TypedDelta) -> None:
        self.take(delta.plain)
        self.parts += delta.parts
        self.chat_finish_reason = delta.finish_reason or self.chat_finish_reason


async def collect(answer: Answer) -> answers.ChatCompletion | answers.Completion:
    """The answer in one piece, once all choices have ended."""
    num_choices = answer.params.num_choices
    choices = [TypedChoice() for _ in range(len(answer.generations) * num_choices)]
    async with aclosing(typed_deltas(answer)) as deltas:
        async for delta in deltas:
            choices[delta.plain.index].take_typed(delta)
    best = [
        (generation, choice)
        for number, generation in enumerate(answer.generations)
        for choice in pick_best(choices[number * num_choices :][:num_choices], answer.params.n)
    ]
    head, logprobs = (answer.id, answer.created, answer.model), answer.logprobs
    if answer.is_chat:
        messages = [
            answers.ChatChoice(
                index,
                _write_message(WholeMessage.join(choice.parts)),
                logprobs.chat(choice.shown),
                choice.chat_finish_reason,
                choice.stop_reason,
            )
            for index, (_, choice) in enumerate(best)
        ]
        of_prompt = _prompt_logprobs(answer, answer.generations[0])
        return answers.ChatCompletion(*head, messages, answer.usage(), of_prompt)
    texts = [
        answers.CompletionChoice(
            index,
            choice.text,
            logprobs.completion(choice.shown),
            choice.finish_reason,
            choice.stop_reason,
            _prompt_logprobs(answer, generation),
        )
        for index, (generation, choice) in enumerate(best)
    ]
    return answers.Completion(*head, texts, answer.usage())


def _write_message(message: WholeMessage) -> answers.AssistantMessage:
    calls = [
        answers.ToolCall(call.id, answers.FunctionCall(call.name, call.arguments))
        for call in message.calls
    ]
    return answers.AssistantMessage(
        message.content or (None if calls else ""), None, message.reasoning or UNSET, calls or UNSET
    )


def _prompt_logprobs(answer: Answer, generation: Generation) -> answers.PromptLogprobs | None:
    asked, found = answer.request.prompt_logprobs, generation.outputs.prompt_logprobs or ()
    return None if asked is None else answer.logprobs.prompt(found, asked)
