"""When the new tokens of choices are told."""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import starmap

from msgspec.structs import replace

from pagoda_runtime.engine.request import Request
from pagoda_runtime.ipc.messages import RequestDelta


class DeltaBuffer:
    """Holds back tokens of requests that want them in bulk.

    The first token of a choice is told at once, the others when `stream_interval` of them are
    there, and all when the choice ends.
    """

    def __init__(self) -> None:
        self._held: dict[str, dict[int, RequestDelta | None]] = {}
        """By request and choice: what is held back, None if all was told."""

    def pass_on(
        self, deltas: Iterable[tuple[Request, RequestDelta]], open_request_ids: Container[str]
    ) -> list[RequestDelta]:
        """What is told after a step; the last delta of a request that has ended says so."""
        told = [delta for delta in starmap(self._merge, deltas) if delta is not None]
        for number in {
            delta.request_id: number
            for number, delta in enumerate(told)
            if delta.request_id not in open_request_ids
        }.values():
            told[number] = replace(told[number], is_last=True)
        # What was held of choices that ended without a word (aborted) is of use to nobody.
        for request_id in [name for name in self._held if name not in open_request_ids]:
            del self._held[request_id]
        return told

    def _merge(self, request: Request, delta: RequestDelta) -> RequestDelta | None:
        """What is to be told now of a choice; None while it is held back."""
        if request.stream_interval == 1:
            return delta
        held = self._held.setdefault(delta.request_id, {})
        is_first = delta.index not in held
        before = held.get(delta.index)
        if before is not None:
            delta = before.join(delta)
        is_told = (
            is_first
            or delta.finish_reason is not None
            or len(delta.new_token_ids) >= request.stream_interval
        )
        held[delta.index] = None if is_told else delta
        return delta if is_told else None
