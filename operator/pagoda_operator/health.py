"""The operator's own HTTP server: /livez, /readyz and /metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from aiohttp import web
from prometheus_client.aiohttp import make_aiohttp_handler

from pagoda_operator.telemetry import Telemetry


async def serve_health(
    port: int, probes: Mapping[str, Callable[[], str | None]], telemetry: Telemetry
) -> web.AppRunner:
    """Serve until the runner's `cleanup`.

    Args:
        probes: path → what is wrong; None if nothing is.

    Raises:
        OSError: the port is taken.
    """
    app = web.Application()
    app.router.add_get("/metrics", make_aiohttp_handler(telemetry.registry))
    for path, find_trouble in probes.items():
        app.router.add_get(path, partial(_answer, find_trouble))
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner


async def _answer(find_trouble: Callable[[], str | None], _: web.Request) -> web.Response:
    trouble = find_trouble()
    return web.Response(status=503 if trouble else 200, text=f"{trouble or 'ok'}\n")
