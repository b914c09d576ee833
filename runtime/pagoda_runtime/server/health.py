"""What probes, scalers and people ask the server about itself."""

from __future__ import annotations

import time
from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagoda_runtime.metrics import CONTENT_TYPE
from pagoda_runtime.server.answers import Running, Startup, Status, Version
from pagoda_runtime.server.errors import json_response
from pagoda_runtime.server.state import LOADING_RETRY_SECONDS, ServerState


def make_routes(state: ServerState) -> list[Route]:
    """GET /startup, /health, /ready, /load, /version, /metrics."""

    async def startup(request: Request) -> Response:
        if state.is_loaded and (ready := state.ready):
            model = Running(
                ready.architecture,
                ready.quantization,
                ready.kv_cache_dtype,
                ready.tensor_parallel_size,
                ready.pooler.task if ready.pooler else "generate",
            )
            return json_response(Startup("ready", 100.0, 0.0, 0.0, model))
        now = state.engine.progress
        body = Startup(now.phase, now.percent, now.bytes_per_second, now.eta_seconds)
        return _json(body, ok=False)

    async def health(request: Request) -> Response:
        problem = find_problem(state, time.monotonic())
        return _json(Status(problem or "ok"), ok=problem is None)

    async def ready(request: Request) -> Response:
        obstacle = find_obstacle(state)
        return _json(Status(obstacle or "ready"), ok=obstacle is None)

    async def load(request: Request) -> Response:
        return json_response(state.load())

    async def show_version(request: Request) -> Response:
        return json_response(Version(version("pagoda-serve")))

    async def metrics(request: Request) -> Response:
        return Response(state.metrics.render(), headers={"content-type": CONTENT_TYPE})

    return [
        Route("/startup", startup),
        Route("/health", health),
        Route("/ready", ready),
        Route("/load", load),
        Route("/version", show_version),
        Route("/metrics", metrics),
    ]


def find_problem(state: ServerState, now: float) -> str | None:
    """Why the process should be restarted, or None. `now` is of time.monotonic()."""
    if state.engine.failure is not None:
        return f"the engine is dead: {state.engine.failure.message}"
    stats, limit = state.engine.stats, state.config.engine.stall_seconds
    silence = now - state.engine.last_step_seconds
    if stats.running + stats.waiting and silence > limit:
        return (
            f"no step finished for {silence:.0f} s (--stall-seconds {limit:g}) with "
            f"{stats.running} requests running and {stats.waiting} waiting"
        )
    return None


def find_obstacle(state: ServerState) -> str | None:
    """Why no new requests should come here, or None."""
    if state.engine.failure is not None:
        return "dead"
    if state.is_draining:
        return "draining"
    return None if state.is_loaded else "loading"


def _json(value: Startup | Status, *, ok: bool) -> Response:
    headers = {} if ok else {"retry-after": str(LOADING_RETRY_SECONDS)}
    return json_response(value, 200 if ok else 503, headers)
