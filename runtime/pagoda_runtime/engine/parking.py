"""Requests that wait for their grammars, beside all others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING

from pagoda_runtime.engine.request import Request
from pagoda_runtime.errors import RequestError

if TYPE_CHECKING:
    from pagoda_runtime.grammar.compiler import Grammar, Grammars


class Parking:
    """Holds requests until their grammars are compiled, or take too long."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._parked: dict[str, tuple[Request, Future[Grammar]]] = {}

    def __len__(self) -> int:
        return len(self._parked)

    def enter(self, request: Request, text: str) -> None:
        self._parked[request.request_id] = request, self._grammars.compile(text)

    def drop(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._parked.pop(request_id, None)

    def wait(self, seconds: float) -> None:
        """Sleep until a grammar is there, for so long at most."""
        wait([future for _, future in self._parked.values()], seconds, FIRST_COMPLETED)

    def leave(self, now: float) -> Iterator[tuple[Request, RequestError | None]]:
        """Those that can begin, with a matcher, and those that cannot, with the reason."""
        for request, future in list(self._parked.values()):
            error: RequestError | None = None
            if future.done():
                try:
                    ignore_eos = request.sampling_params.ignore_eos
                    request.matcher = future.result().begin(ignore_eos=ignore_eos)
                except RequestError as found:
                    error = found
            elif now < request.arrival_seconds + self._grammars.compile_seconds:
                continue
            else:
                error = self._grammars.too_slow()
            del self._parked[request.request_id]
            yield request, error
