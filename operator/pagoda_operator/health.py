"""The operator's own HTTP server: /livez, /readyz and /metrics."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from pagoda_operator.telemetry import Telemetry


async def serve_health(
    port: int, *, is_alive: Callable[[], bool], is_ready: Callable[[], bool], telemetry: Telemetry
) -> web.AppRunner:
    """Serve until the runner's `cleanup`.

    Raises:
        OSError: the port is taken.
    """

    async def livez(_: web.Request) -> web.Response:
        return _answer(is_alive())

    async def readyz(_: web.Request) -> web.Response:
        return _answer(is_ready())

    async def metrics(_: web.Request) -> web.Response:
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body=telemetry.render(), headers={"Content-Type": content_type})

    app = web.Application()
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner


def _answer(is_ok: bool) -> web.Response:
    return web.Response(status=200 if is_ok else 503, text="ok\n" if is_ok else "not ok\n")
