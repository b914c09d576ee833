"""From what became of the sequences to the messages that tell it."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence

from pagoda_runtime.engine.progress import Progress
from pagoda_runtime.engine.request import Request
from pagoda_runtime.ipc.messages import RequestDelta


class DeltaMaker:
    """Makes the deltas of each step, and holds back tokens of requests that want them in bulk.

    The first token of a choice is told at once, the others when `stream_interval` of them are
    there, and all when the choice ends.
    """

    def __init__(self) -> None:
        self._held: dict[Request, dict[int, Progress]] = {}

    def make(
        self, progress: Sequence[Progress], open_request_ids: Container[str]
    ) -> list[RequestDelta]:
        """The deltas of a step; the last delta of a request that has ended says so."""
        told = [item for item in map(self._pass_on, progress) if item is not None]
        last_of = {item.request: number for number, item in enumerate(told)}
        deltas = []
        for number, item in enumerate(told):
            has_ended = item.request.request_id not in open_request_ids
            is_last = has_ended and last_of[item.request] == number
            deltas.append(_make_delta(item, is_last=is_last))
        # What was held of choices that ended without a word (aborted) is of use to nobody.
        for request in [r for r in self._held if r.request_id not in open_request_ids]:
            del self._held[request]
        return deltas

    def _pass_on(self, item: Progress) -> Progress | None:
        """What is to be told now of a choice; None while it is held back."""
        request = item.request
        if request.stream_interval == 1:
            return item
        held = self._held.setdefault(request, {})
        before = held.pop(item.index, None)
        if before is not None:
            item = dataclasses.replace(
                item,
                token_ids=[*before.token_ids, *item.token_ids],
                logprobs=None
                if item.logprobs is None
                else [*(before.logprobs or []), *item.logprobs],
            )
        if (
            item.is_first
            or item.finish_reason is not None
            or len(item.token_ids) >= request.stream_interval
        ):
            return item
        held[item.index] = item
        return None


def _make_delta(item: Progress, *, is_last: bool) -> RequestDelta:
    request = item.request
    has_prompt_logprobs = request.sampling_params.prompt_logprobs is not None
    return RequestDelta(
        request_id=request.request_id,
        index=item.index,
        new_token_ids=item.token_ids,
        logprobs=item.logprobs,
        prompt_logprobs=(
            request.prompt_logprobs
            if item.is_first and item.index == 0 and has_prompt_logprobs
            else None
        ),
        finish_reason=item.finish_reason,
        stop_reason=item.stop_reason,
        cumulative_logprob=item.cumulative_logprob,
        is_last=is_last,
        num_cached_tokens=request.num_cached_tokens,
        queue_seconds=request.queue_seconds if item.is_first and item.index == 0 else None,
    )
