"""The operator's own HTTP server: /livez, /readyz and /metrics."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client.aiohttp import make_aiohttp_handler

from pagoda_operator.telemetry import Telemetry


async def serve_health(
    port: int,
    *,
    is_alive: Callable[[], bool],
    hindrance: Callable[[], str | None],
    telemetry: Telemetry,
) -> web.AppRunner:
    """Serve until the runner's `cleanup`.

    Args:
        hindrance: why the operator is not ready; None if it is.

    Raises:
        OSError: the port is taken.
    """

    async def livez(_: web.Request) -> web.Response:
        return _answer(None if is_alive() else "not ok")

    async def readyz(_: web.Request) -> web.Response:
        return _answer(hindrance())

    app = web.Application()
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", make_aiohttp_handler(telemetry.registry))
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner


def _answer(trouble: str | None) -> web.Response:
    return web.Response(status=503 if trouble else 200, text=f"{trouble or 'ok'}\n")
