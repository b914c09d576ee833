"""A sample of `make faults`, on a control plane of its own."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.bench import Outcome, control_plane_in, make_bench
from faults.crashes import run_crashes
from faults.errors import run_errors
from faults.outages import run_outage
from faults.plan import ErrorKind
from faults.scenarios import SCENARIOS

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        bool(os.environ.get("CONTEXT")),
        reason="with CONTEXT no control plane is built, and the bench needs one of its own",
    ),
]
CREATE = [it for it in SCENARIOS if it.name == "create"]
SAMPLE: tuple[ErrorKind, ...] = ("409", "429", "reset after", "bad JSON")
DELETE_CHILD = [it for it in SCENARIOS if it.name == "child deleted"]


@pytest.fixture(scope="module")
def plane() -> Iterator[dict[str, str]]:
    # A short path: the names of unix sockets end after 107 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as folder,
        control_plane_in(Path(folder) / "plane") as paths,
    ):
        yield paths


def assert_all_went_well(outcomes: list[Outcome], violations: list[str]) -> None:
    failed = [json.dumps(it.as_json()) for it in outcomes if it.problems]
    assert not failed, "\n".join(failed)
    assert not violations
    assert any(it.is_reached for it in outcomes)


async def test_an_operator_killed_around_each_write_of_a_new_service_converges(
    plane: dict[str, str], tmp_path: Path
) -> None:
    async with make_bench(tmp_path, Path(plane["kubeconfig"]), plane["helm"]) as bench:
        outcomes, violations = await run_crashes(bench, CREATE, num_operators=2)
    assert_all_went_well(outcomes, violations)
    assert {it.restarts for it in outcomes if it.is_reached} == {1}


async def test_each_error_at_each_request_of_a_repair_is_survived(
    plane: dict[str, str], tmp_path: Path
) -> None:
    async with make_bench(tmp_path, Path(plane["kubeconfig"]), plane["helm"]) as bench:
        outcomes, violations = await run_errors(bench, DELETE_CHILD, SAMPLE)
    assert_all_went_well(outcomes, violations)


async def test_an_outage_is_survived(plane: dict[str, str], tmp_path: Path) -> None:
    async with make_bench(tmp_path, Path(plane["kubeconfig"]), plane["helm"]) as bench:
        figures = await run_outage(bench, 20.0, num_services=5, limit_seconds=120.0)
    assert not figures["problems"]
