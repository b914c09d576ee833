"""One answer: its choices as they come, as a stream of chunks or in one piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from msgspec import UNSET
from msgspec.json import encode

from pagoda_runtime.client.output_processor import TextDelta, WholeChoice, pick_best
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server import answers
from pagoda_runtime.server.generation import Generation, close_all, merge
from pagoda_runtime.server.logprobs import LogprobsWriter
from pagoda_runtime.server.protocol import ChatCompletionRequest, GenerationRequest


@dataclass(slots=True)
class Answer:
    """One answer in the making: its identity, its prompts and what was counted so far."""

    request: GenerationRequest
    params: SamplingParams
    id: str
    model: str
    created: int
    logprobs: LogprobsWriter
    generations: list[Generation] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_tokens: int = 0

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatCompletionRequest)

    def usage(self) -> answers.Usage:
        """Tokens so far, over all choices, those included that are not shown."""
        prompt, completion = self.num_prompt_tokens, self.num_tokens
        cached = sum(generation.outputs.num_cached_tokens for generation in self.generations)
        return answers.Usage(
            prompt, completion, prompt + completion, answers.PromptTokensDetails(cached)
        )


async def stream(answer: Answer) -> AsyncGenerator[bytes, None]:
    """The chunks of an answer, as server-sent events."""
    request, write = answer.request, ChunkWriter(answer).write
    has_usage = request.has_continuous_usage
    make_choice = _chat_choice if answer.is_chat else _text_choice
    if answer.is_chat:
        for index in range(len(answer.generations) * answer.params.n):
            first = answers.ChatChunkChoice(index, answers.Delta("assistant", ""), None, None)
            yield write(first, answer.usage() if has_usage else None)
    async with aclosing(merge(answer.generations)) as deltas:
        async for delta in deltas:
            answer.num_tokens += len(delta.token_ids)
            if delta.text or delta.finish_reason is not None or has_usage or delta.shown:
                choice = make_choice(delta, answer.logprobs)
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


def _chat_choice(delta: TextDelta, logprobs: LogprobsWriter) -> answers.ChatChunkChoice:
    content, reason = answers.Delta(UNSET, delta.text or UNSET), delta.finish_reason
    stop_reason = UNSET if reason is None else delta.stop_reason
    return answers.ChatChunkChoice(
        delta.index, content, logprobs.chat(delta.shown), reason, stop_reason
    )


def _text_choice(delta: TextDelta, logprobs: LogprobsWriter) -> answers.CompletionChunkChoice:
    of_text, reason = logprobs.completion(delta.shown), delta.finish_reason
    stop_reason = UNSET if reason is None else delta.stop_reason
    return answers.CompletionChunkChoice(delta.index, delta.text, of_text, reason, stop_reason)


async def collect(answer: Answer) -> answers.ChatCompletion | answers.Completion:
    """The answer in one piece, once all choices have ended."""
    num_choices = answer.params.num_choices
    choices = [WholeChoice() for _ in range(len(answer.generations) * num_choices)]
    try:
        async with aclosing(merge(answer.generations)) as deltas:
            async for delta in deltas:
                answer.num_tokens += len(delta.token_ids)
                choices[delta.index].take(delta)
    finally:
        await close_all(answer.generations)
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
                answers.AssistantMessage(choice.text, None),
                logprobs.chat(choice.shown),
                choice.finish_reason,
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


def _prompt_logprobs(answer: Answer, generation: Generation) -> answers.PromptLogprobs | None:
    asked, found = answer.request.prompt_logprobs, generation.outputs.prompt_logprobs or ()
    return None if asked is None else answer.logprobs.prompt(found, asked)
