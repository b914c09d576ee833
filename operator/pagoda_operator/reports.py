"""What engines say that they run, in the words of the CRD."""

from __future__ import annotations

import asyncio
import json
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagoda_operator.engines import Inquiries, Inquiry, Silence, ready_address
from pagoda_operator.flags import flag_value
from pagoda_operator.names import LABEL_REVISION, Key, Manifest
from pagoda_operator.queue import backoff_seconds
from pagoda_operator.spec import DType, KvCacheDtype, Quantization

# Of all services; what is asked for is not urgent.
MAX_ASKED_AT_ONCE = 20
MAX_TENSOR_PARALLEL_SIZE = 1024
_WORD = re.compile(r"[\w.-]{1,63}", re.ASCII)

Container = tuple[str, int]
"""The name of a pod, and how often its container was started anew."""


@dataclass(slots=True)
class _Asked(Inquiry):
    container: Container
    report: Manifest | None = None


@dataclass(slots=True)
class Reports(Inquiries[_Asked]):
    """Asks one ready engine of a service, and another one when that is gone."""

    _slots: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(MAX_ASKED_AT_ONCE), init=False
    )

    def find(self, key: Key, pods: Sequence[Manifest], revision: str) -> Manifest | None:
        """What an engine of this revision runs; empty if it does not say, None if not known yet."""
        ready = {
            _container(pod): address
            for pod in pods
            if pod["metadata"].get("labels", {}).get(LABEL_REVISION) == revision
            and (address := ready_address(pod)) is not None
        }
        asked = self._asked.get(key)
        if asked is None or asked.container not in ready:
            self.forget(key)
            if not ready:
                return None
            container = min(ready)
            asked = self._asked[key] = _Asked(container)
            asked.start(self._ask(key, asked, ready[container]))
        return asked.report

    async def _ask(self, key: Key, asked: _Asked, address: str) -> None:
        num_failures = 0
        while isinstance(
            answer := await self.engines.read(address, "/startup", self._slots), Silence
        ):
            num_failures += 1
            await asyncio.sleep(backoff_seconds(num_failures, 1.0))
        asked.report = parse_report(answer)
        self.on_change(key)


def parse_report(body: bytes) -> Manifest:
    """`status.model` from an engine's answer at `/startup`; empty if that says nothing."""
    try:
        model = json.loads(body)["model"]
        words = [model["architecture"], model["quantization"], model["kv_cache_dtype"]]
        size = model["tensor_parallel_size"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
    are_words = all(isinstance(word, str) and _WORD.fullmatch(word) for word in words)
    if not are_words or type(size) is not int or not 1 <= size <= MAX_TENSOR_PARALLEL_SIZE:
        return {}
    architecture, quantization, kv_cache_dtype = words
    return {
        "architecture": architecture,
        "quantization": _say(quantization, Quantization),
        "kvCacheDtype": _say(kv_cache_dtype, KvCacheDtype, DType),
        "tensorParallelSize": size,
    }


def _say(word: str, *enums: object) -> str:
    """The CRD's word for one of a flag; a newer engine may have one that the CRD has not."""
    words = {flag_value(choice): choice for enum in enums for choice in typing.get_args(enum)}
    return str(words.get(word, word))


def _container(pod: Manifest) -> Container:
    statuses = pod["status"].get("containerStatuses", [])
    return pod["metadata"]["name"], sum(status.get("restartCount", 0) for status in statuses)
