"""An answer as /v1/responses tells it: the response, its items, and the events of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from pagoda_runtime.server import responses_answers as answers
from pagoda_runtime.server.answer import Answer
from pagoda_runtime.server.blocks import Block, Blocks, Change, write_event
from pagoda_runtime.server.errors import ApiError
from pagoda_runtime.server.responses_protocol import ResponsesRequest

_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}
# The events of a block's text, by the kind of the block.
_TEXT_EVENTS = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}


@dataclass(slots=True)
class ResponseWriter:
    """Writes one response."""

    body: ResponsesRequest
    answer: Answer
    blocks: Blocks = field(default_factory=Blocks)
    num_events: int = 0

    @property
    def is_cut_off(self) -> bool:
        """Whether the answer ended for want of tokens, in its last block."""
        last = self.blocks.last
        return last is not None and last.finish_reason == "length"

    @property
    def key(self) -> str:
        """What is in the ids of the response and its items, and in that of the traces."""
        return self.answer.id.rpartition("-")[2]

    def write_event(self, kind: str, **fields: Any) -> bytes:
        self.num_events += 1
        return write_event(kind, sequence_number=self.num_events - 1, **fields)

    def write_error(self, error: ApiError) -> bytes:
        """The end of a stream that failed."""
        details = error.body.error
        fields = {"code": details.code or details.type, "message": details.message}
        return self.write_event("error", **fields, param=details.param) + self.write_event(
            "response.failed", response=self.describe("failed", error)
        )

    def write_change(self, change: Change) -> bytes:
        block, kind = change.block, _TEXT_EVENTS[change.block.kind]
        is_call, index = block.kind == "call", block.index
        place: dict[str, Any] = {"item_id": self._id_of(block), "output_index": index}
        if not is_call:
            place["content_index"] = 0
        of_text = {**place, "logprobs": []} if block.kind == "text" else place
        if change.what == "text":
            # Without the item: its text so far would be joined for each token.
            return self.write_event(f"{kind}.delta", **of_text, delta=change.text)
        item = self._item(block, is_begun=change.what == "start")
        if change.what == "start":
            added = self.write_event("response.output_item.added", output_index=index, item=item)
            part = "response.content_part.added"
            return added if is_call else added + self._write_part(part, place, block)
        whole = {"arguments" if is_call else "text": block.text}
        done = self.write_event(f"{kind}.done", **of_text, **whole)
        if not is_call:
            done += self._write_part("response.content_part.done", place, block)
        return done + self.write_event("response.output_item.done", output_index=index, item=item)

    def _write_part(self, kind: str, place: dict[str, Any], block: Block) -> bytes:
        return self.write_event(kind, **place, part=_part(block))

    def _id_of(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self.key}{block.index}"

    def _item(self, block: Block, *, is_begun: bool = False) -> answers.OutputItem:
        is_cut_off = self.is_cut_off and block is self.blocks.blocks[-1]
        status: answers.ItemStatus = "incomplete" if is_cut_off else "completed"
        head = self._id_of(block), "in_progress" if is_begun else status
        if block.kind == "call":
            return answers.OutputCall(*head, block.call_id, block.name, block.text)
        content = [] if is_begun else [_part(block)]
        if block.kind == "text":
            return answers.OutputMessage(*head, "assistant", content)
        return answers.OutputReasoning(*head, [], content)

    def describe(
        self, status: answers.ResponseStatus | None = None, error: ApiError | None = None
    ) -> answers.Response:
        """The response as it is; without a status, at its end."""
        body, params, usage = self.body, self.answer.params, self._usage()
        status = status or ("incomplete" if self.is_cut_off else "completed")
        failure = details = None
        if error is not None:
            failure = answers.ResponseError(error.body.error.code or "server_error", str(error))
        if status == "incomplete":
            details = answers.IncompleteDetails("max_output_tokens")
        return answers.Response(
            id=f"resp_{self.key}",
            created_at=self.answer.created,
            status=status,
            model=self.answer.model,
            output=[] if status == "in_progress" else [*map(self._item, self.blocks.blocks)],
            usage=None if status == "in_progress" else usage,
            error=failure,
            incomplete_details=details,
            background=bool(body.background),
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            reasoning=_dump(body.reasoning) or {"effort": None, "summary": None},
            store=body.store is not False,
            temperature=params.temperature,
            text=_dump(body.text) or {"format": {"type": "text"}},
            tool_choice=_dump(body.tool_choice) or "auto",
            tools=[_dump(tool) for tool in body.tools or ()],
            top_p=params.top_p,
            truncation="disabled",
            user=body.user,
        )

    def _usage(self) -> answers.ResponseUsage:
        usage = self.answer.usage()
        return answers.ResponseUsage(
            usage.prompt_tokens,
            answers.InputTokensDetails(usage.prompt_tokens_details.cached_tokens, 0),
            usage.completion_tokens,
            answers.OutputTokensDetails(self.answer.num_reasoning_tokens),
            usage.total_tokens,
        )


def _part(block: Block) -> Any:
    is_text = block.kind == "text"
    return answers.OutputText(block.text, [], []) if is_text else answers.ReasoningText(block.text)


def _dump(value: BaseModel | str | None) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True, exclude_none=True)
    return value
