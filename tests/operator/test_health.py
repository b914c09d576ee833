"""The operator's own HTTP server."""

from __future__ import annotations

import aiohttp

from pagoda_operator.health import serve_health
from pagoda_operator.telemetry import Telemetry


async def test_probes_and_metrics_say_how_the_operator_is(unused_tcp_port: int) -> None:
    telemetry = Telemetry()
    telemetry.scale_decisions.labels(reason="demand").inc()
    trouble: list[str | None] = ["the LLMServices are not listed yet", None]
    server = await serve_health(
        unused_tcp_port, {"/livez": lambda: None, "/readyz": lambda: trouble.pop(0)}, telemetry
    )
    async with aiohttp.ClientSession(f"http://127.0.0.1:{unused_tcp_port}") as session:

        async def get(path: str) -> tuple[int, str]:
            async with session.get(path) as answer:
                return answer.status, await answer.text()

        assert await get("/livez") == (200, "ok\n")
        assert await get("/readyz") == (503, "the LLMServices are not listed yet\n")
        assert await get("/readyz") == (200, "ok\n")
        status, metrics = await get("/metrics")
    await server.cleanup()
    assert status == 200
    assert 'pagoda_operator_scale_decisions_total{reason="demand"} 1.0' in metrics
