"""Asks pods over HTTP what they tell of themselves.

Pods are not trusted: what one answers is bounded, and it never chooses what the operator fetches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar

import aiohttp

from pagoda_operator.causes import OWN_CONTAINERS, is_ready
from pagoda_operator.flags import PORT
from pagoda_operator.names import Key, Manifest, is_leaving

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 2.0
# An engine answers a line of JSON; what is longer is no engine of ours.
MAX_ANSWER_BYTES = 16384


class Silence(StrEnum):
    """Why a pod's answer is not known."""

    TIMEOUT = f"no answer within {ANSWER_SECONDS:g} s"
    UNREACHABLE = "no connection"
    STATUS = "an HTTP status other than 200"
    ANSWER = "not the answer of an engine"
    ERROR = "an error of the operator; see its log"


@dataclass(slots=True)
class Engines:
    """One session for the pods of all services."""

    port: int = PORT
    _session: aiohttp.ClientSession | None = field(default=None, init=False)

    async def read(
        self,
        address: str,
        path: str,
        slots: asyncio.Semaphore,
        *,
        statuses: Collection[int] = (200,),
    ) -> bytes | Silence:
        """The body of a pod's answer, or why there is none.

        Args:
            slots: bounds how many are asked at once.
            statuses: of HTTP whose body is an answer.
        """
        try:
            async with slots, asyncio.timeout(ANSWER_SECONDS):
                return await self._get(f"http://{address}:{self.port}{path}", statuses)
        except TimeoutError:
            return Silence.TIMEOUT
        except (OSError, aiohttp.ClientError):
            return Silence.UNREACHABLE
        except Exception:
            logger.exception("%s cannot be asked for %s", address, path)
            return Silence.ERROR

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _get(self, url: str, statuses: Collection[int]) -> bytes | Silence:
        # A redirect would let a pod choose what the operator fetches.
        async with self._open_session().get(url, allow_redirects=False) as response:
            if response.status not in statuses:
                return Silence.STATUS
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    return Silence.ANSWER
            return bytes(body)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # The default of 100 is one limit for all services.
                connector=aiohttp.TCPConnector(limit=0),
                # Nothing of a pod lasts, or grows while it is read.
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                # No proxy of the environment: pods are reached directly.
                trust_env=False,
            )
        return self._session


@dataclass(slots=True)
class Inquiry:
    """A task that asks engines of one service."""

    task: asyncio.Task[None] = field(init=False)

    def start(self, asking: Coroutine[Any, Any, None]) -> None:
        self.task = asyncio.get_running_loop().create_task(asking)


AnyInquiry = TypeVar("AnyInquiry", bound=Inquiry)


@dataclass(slots=True)
class Inquiries(Generic[AnyInquiry]):
    """The inquiries of all services; `on_change` hears of news."""

    engines: Engines
    on_change: Callable[[Key], None]
    _asked: dict[Key, AnyInquiry] = field(default_factory=dict, init=False)

    def forget(self, key: Key) -> None:
        """Stop asking for this service."""
        asked = self._asked.pop(key, None)
        if asked is not None:
            asked.task.cancel()

    async def close(self) -> None:
        tasks = [asked.task for asked in self._asked.values()]
        for key in list(self._asked):
            self.forget(key)
        await asyncio.gather(*tasks, return_exceptions=True)


def ready_address(pod: Manifest) -> str | None:
    """The address of a pod that answers requests, for use in a URL; None if it does not."""
    return _address(pod) if is_ready(pod) else None


def starting_address(pod: Manifest) -> str | None:
    """The same of a pod whose container runs and has not started yet."""
    statuses = pod.get("status", {}).get("containerStatuses", [])
    is_starting = any(
        status["name"] in OWN_CONTAINERS
        and "running" in status.get("state", {})
        and not status.get("started")
        for status in statuses
    )
    return _address(pod) if is_starting and not is_ready(pod) else None


def _address(pod: Manifest) -> str | None:
    ip = pod.get("status", {}).get("podIP")
    if is_leaving(pod) or not ip:
        return None
    return f"[{ip}]" if ":" in ip else str(ip)
