"""The paths that the operator probes and polls are those that the server answers."""

from __future__ import annotations

import typing

from pagoda_operator import poll, render
from pagoda_operator.testing import make_service
from pagoda_runtime.server import health
from pagoda_runtime.server.state import ServerState

PATHS = {"startup": "/startup", "readiness": "/ready", "liveness": "/health"}


def test_every_probe_asks_for_a_path_of_the_server() -> None:
    deployment = render.render_deployment(make_service(), engine_image="engine:1")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in PATHS}
    assert {kind: probe["path"] for kind, probe in probes.items()} == PATHS
    # No endpoint is called: the state is not looked at.
    served = {route.path for route in health.make_routes(typing.cast(ServerState, None))}
    assert {*PATHS.values(), "/load", "/startup"} <= served
    assert {probe["port"] for probe in probes.values()} == {render.PORT}


def test_a_busy_engine_is_taken_out_of_the_service_before_it_is_restarted() -> None:
    deployment = render.render_deployment(make_service(), engine_image="engine:1")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]

    def horizon(kind: str) -> int:
        probe = container[f"{kind}Probe"]
        return int(probe["periodSeconds"] * probe["failureThreshold"])

    assert horizon("readiness") < horizon("liveness") < horizon("startup")
    assert horizon("startup") < deployment["spec"]["progressDeadlineSeconds"]


def test_the_operator_asks_often_enough_to_scale_within_seconds() -> None:
    assert poll.BUSY_SECONDS <= poll.IDLE_SECONDS <= 5.0
