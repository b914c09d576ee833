"""One answer: its choices as they come, as a stream of chunks or in one piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from pagoda_runtime.client.output_processor import ShownToken, WholeChoice, pick_best
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.generation import Generation, close_all, merge
from pagoda_runtime.server.logprobs import LogprobsWriter
from pagoda_runtime.server.protocol import ChatCompletionRequest, GenerationRequest
from pagoda_runtime.server.streaming import ChunkWriter


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

    def usage(self) -> dict[str, Any]:
        """Tokens so far, over all choices, those included that are not shown."""
        prompt, completion = self.num_prompt_tokens, self.num_tokens
        cached = sum(generation.outputs.num_cached_tokens for generation in self.generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def render_logprobs(self, tokens: list[ShownToken]) -> dict[str, Any] | None:
        """None if none were asked for."""
        if self.request.num_logprobs is None:
            return None
        return self.logprobs.chat(tokens) if self.is_chat else self.logprobs.completion(tokens)


async def stream(answer: Answer) -> AsyncGenerator[bytes, None]:
    """The chunks of an answer, as server-sent events."""
    request = answer.request
    kind = "chat.completion.chunk" if answer.is_chat else "text_completion"
    writer = ChunkWriter(kind, answer.id, answer.model, answer.created, request.includes_usage)
    has_usage = request.has_continuous_usage
    if answer.is_chat:
        for index in range(len(answer.generations) * answer.params.n):
            yield writer.write_role(index, answer.usage() if has_usage else None)
    async with aclosing(merge(answer.generations)) as deltas:
        async for delta in deltas:
            answer.num_tokens += len(delta.token_ids)
            if delta.text or delta.finish_reason is not None or has_usage or delta.shown:
                yield writer.write_text(
                    delta,
                    answer.render_logprobs(delta.shown),
                    answer.usage() if has_usage else None,
                )
    if request.includes_usage:
        yield writer.write_usage(answer.usage())


async def collect(answer: Answer) -> dict[str, Any]:
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
    shown: list[dict[str, Any]] = []
    for number, generation in enumerate(answer.generations):
        first = number * num_choices
        for choice in pick_best(choices[first : first + num_choices], answer.params.n):
            rendered = _render_choice(answer, len(shown), choice)
            if not answer.is_chat:
                rendered |= _prompt_logprobs(answer, generation)
            shown.append(rendered)
    body = {
        "id": answer.id,
        "object": "chat.completion" if answer.is_chat else "text_completion",
        "created": answer.created,
        "model": answer.model,
        "choices": shown,
        "usage": answer.usage(),
    }
    if answer.is_chat:
        body |= _prompt_logprobs(answer, answer.generations[0])
    return body


def _prompt_logprobs(answer: Answer, generation: Generation) -> dict[str, Any]:
    asked = answer.request.prompt_logprobs
    found = generation.outputs.prompt_logprobs or ()
    return {"prompt_logprobs": None if asked is None else answer.logprobs.prompt(found, asked)}


def _render_choice(answer: Answer, index: int, choice: WholeChoice) -> dict[str, Any]:
    text, last = choice.text, choice.last
    assert last is not None
    if answer.is_chat:
        content: dict[str, Any] = {
            "message": {"role": "assistant", "content": text, "refusal": None}
        }
    else:
        content = {"text": text}
    return {
        "index": index,
        **content,
        "logprobs": answer.render_logprobs(choice.shown),
        "finish_reason": last.finish_reason,
        "stop_reason": last.stop_reason,
    }
