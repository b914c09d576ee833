"""The way of one operator to the API server: every request is recorded, some of them fail.

Plain HTTP before it, TLS behind it; the operator's own token goes through. One proxy belongs to
one operator, which it kills where a shot says so.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import aiohttp
from aiohttp import web

from faults.api import Api, whole_lines
from faults.plan import (
    FORWARDED,
    RETRY_AFTER_SECONDS,
    Request,
    Shot,
    WatchFault,
    answer_of,
    read_event,
    read_request,
    status_body,
)

MAX_HANG_SECONDS = 60.0
NUM_REPLAYED = 20
_DROPPED_HEADERS = ("host", "content-length", "connection", "accept-encoding")


class FaultProxy:
    """`async with FaultProxy(api)`: listens on a free port of loopback, and has the record."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.record: list[Request] = []
        self.told: list[Request] = []
        """What its watches told of LLMServices."""
        self.shots: list[Shot] = []
        self.watch_faults: list[WatchFault] = []
        self.kill: Callable[[], None] = lambda: None
        self.stale_lists: dict[str, list[bytes]] = {}
        """Resource → answers from the past, for the next lists that are of no one service."""
        self.port = 0
        self._is_cut = False
        self._open: set[asyncio.Transport] = set()
        self._past: dict[str, deque[bytes]] = {}

    async def __aenter__(self) -> FaultProxy:
        connector = aiohttp.TCPConnector(ssl=self._api.trust, limit=0)
        self._session = aiohttp.ClientSession(self._api.server, connector=connector)
        app = web.Application(client_max_size=16 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        await self._runner.cleanup()
        await self._session.close()

    def cut(self) -> None:
        """The API server is gone: every connection is reset, and every new one."""
        self._is_cut = True
        for transport in self._open:
            transport.abort()

    def restore(self) -> None:
        self._is_cut = False

    @contextmanager
    def armed(self, *shots: Shot) -> Iterator[None]:
        """These shots are in the plan for a while."""
        self.shots.extend(shots)
        try:
            yield
        finally:
            for shot in shots:
                self.shots.remove(shot)

    def of_service(self, name: str, since: int = 0) -> list[Request]:
        """The requests about one LLMService, from the number on."""
        return [it for it in self.record[since:] if it.service == name]

    def watched(self, since: int = 0) -> set[str]:
        """Resources of which a watch was opened."""
        return {it.resource for it in self.record[since:] if it.verb == "watch"}

    async def _handle(self, incoming: web.Request) -> web.StreamResponse:
        transport = incoming.transport
        assert isinstance(transport, asyncio.Transport)
        if self._is_cut:
            return _abort(transport)
        self._open.add(transport)
        try:
            return await self._answer(incoming, transport)
        except aiohttp.ClientError:
            return _abort(transport)
        finally:
            self._open.discard(transport)

    async def _answer(
        self, incoming: web.Request, transport: asyncio.Transport
    ) -> web.StreamResponse:
        content = await incoming.read()
        body = json.loads(content) if content else None
        request = read_request(
            len(self.record), time.monotonic(), incoming.method, incoming.raw_path, body
        )
        self.record.append(request)
        shot = next((shot for shot in self.shots if shot.take(request)), None)
        if shot is not None:
            request.fault = shot.kind
        try:
            return await self._fulfil(incoming, transport, request, content, shot)
        finally:
            if shot is not None:
                shot.over_at = time.monotonic()

    async def _fulfil(
        self,
        incoming: web.Request,
        transport: asyncio.Transport,
        request: Request,
        content: bytes,
        shot: Shot | None,
    ) -> web.StreamResponse:
        fault = "" if shot is None else shot.kind
        if fault == "delay":
            await asyncio.sleep(1.0)
        if fault == "hang":
            await self._hang(transport)
            return _abort(transport)
        if fault and fault not in FORWARDED:
            return self._fail(transport, request, fault)
        if request.verb == "watch":
            return await self._watch(incoming, transport, request)
        headers = {k: v for k, v in incoming.headers.items() if k.lower() not in _DROPPED_HEADERS}
        # A connection that the server closed meanwhile is no fault that a plan asked for.
        async with self._session.request(
            incoming.method, request.path, data=content or None, headers=headers
        ) as response:
            answer = await response.read()
            request.status = response.status
        _note(request, answer)
        if fault:
            return self._fail(transport, request, fault, answer)
        is_of_all = request.verb == "list" and not request.service
        if is_of_all and self.stale_lists.get(request.resource):
            answer = self.stale_lists[request.resource].pop()
        return web.Response(status=request.status, body=answer, content_type=response.content_type)

    def _fail(
        self, transport: asyncio.Transport, request: Request, fault: str, answer: bytes = b""
    ) -> web.StreamResponse:
        if fault.isdecimal():
            code = int(fault)
            headers = {}
            if code == 429:
                request.retry_after_seconds = RETRY_AFTER_SECONDS
                headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
            request.status = code
            return web.json_response(status_body(code), status=code, headers=headers)
        if fault == "bad JSON":
            half = answer[: len(answer) // 2]
            return web.Response(status=request.status, body=half, content_type="application/json")
        if fault.startswith("kill"):
            self.kill()
        return _abort(transport)

    async def _hang(self, transport: asyncio.Transport) -> None:
        deadline = time.monotonic() + MAX_HANG_SECONDS
        while not transport.is_closing() and time.monotonic() < deadline:
            await asyncio.sleep(0.1)

    async def _watch(
        self, incoming: web.Request, transport: asyncio.Transport, request: Request
    ) -> web.StreamResponse:
        headers = {k: v for k, v in incoming.headers.items() if k.lower() not in _DROPPED_HEADERS}
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._session.get(request.path, headers=headers, timeout=timeout) as upstream:
            request.status = upstream.status
            for frozen in self.watch_faults:
                if frozen.resource == request.resource and frozen.kind == "freeze":
                    # Of the stream that was open; this is the next one.
                    frozen.is_over = True
            if upstream.status != 200:
                return web.Response(
                    status=upstream.status,
                    body=await upstream.read(),
                    content_type="application/json",
                )
            downstream = web.StreamResponse(headers={"Content-Type": "application/json"})
            await downstream.prepare(incoming)
            # The operator that went away is no error of the proxy.
            with suppress(ConnectionError, aiohttp.ClientError):
                async for line in whole_lines(upstream.content):
                    for out in await self._through(request.resource, line):
                        if told := read_event(time.monotonic(), request.resource, out):
                            self.told.append(told)
                        await downstream.write(out + b"\n")
                        if b'"ERROR"' in out[:20]:
                            return downstream
        return downstream

    async def _through(self, resource: str, line: bytes) -> list[bytes]:
        """What becomes of one event of a watch."""
        event: dict[str, Any] = json.loads(line)
        fault = next((it for it in self.watch_faults if it.concerns(resource, event)), None)
        past = self._past.setdefault(resource, deque(maxlen=NUM_REPLAYED))
        if event["type"] != "BOOKMARK":
            past.append(line)
        if fault is None:
            return [line]
        fault.fired += 1
        # A fault of one event is over with it, and one of all events when the bench says so.
        fault.is_over = fault.event is not None or fault.kind.startswith("error")
        match fault.kind:
            case "freeze" | "drop":
                return []
            case "duplicate":
                return [line, line]
            case "replay":
                return [line, *past]
            case "delay":
                # The stream stands still for so long, and then shows what has come meanwhile.
                now = time.monotonic()
                if now > fault.until + 0.5:
                    fault.until = now + fault.seconds
                await asyncio.sleep(max(fault.until - now, 0.0))
                return [line]
        code = int(fault.kind.removeprefix("error "))
        return [json.dumps({"type": "ERROR", "object": status_body(code)}).encode()]


def _abort(transport: asyncio.Transport) -> web.Response:
    """Reset the connection; the answer goes nowhere."""
    transport.abort()
    return web.Response()


def _note(request: Request, answer: bytes) -> None:
    """Keep what the oracles ask of an answer about an LLMService."""
    if request.resource != "llmservices" or request.verb == "list" or request.status >= 300:
        return
    request.answer = answer_of(json.loads(answer))
