"""Two operators of one installation: the second one goes on where the first is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kube import Kubectl, wait_until
from operator_process import OperatorProcess
from services import deployment, engine_arguments, manifest, start_service

from pagoda_operator import lease

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
FLAGS = ("--replica-of=team/pagoda-operator",)


@pytest.fixture
def replicas(
    namespace: Kubectl, tmp_path: Path
) -> Iterator[tuple[OperatorProcess, OperatorProcess]]:
    """One that serves, and one that stands by and is ready nevertheless."""
    leader, reserve = (
        OperatorProcess(namespace, tmp_path / name, flags=FLAGS) for name in ("first", "second")
    )
    with leader.running():
        reserve.start()
        try:
            assert "this replica stands by" in reserve.log
            start_service(namespace)
            yield leader, reserve
        finally:
            reserve.kill()


def seconds_until_served(kubectl: Kubectl, process: OperatorProcess, number: int) -> float:
    """From the loss of the leader by a signal until an edit made then reaches the Deployment."""
    started = time.monotonic()
    os.kill(process.pid, number)
    kubectl.apply(manifest(engine={"maxNumSeqs": 7}))
    wait_until(
        "the edit answered",
        lambda: "--max-num-seqs 7 " in engine_arguments(deployment(kubectl)),
        timeout_seconds=60,
        interval_seconds=0.05,
    )
    seconds = time.monotonic() - started
    print(f"{signal.Signals(number).name}: {seconds:.1f} s")
    return seconds


def test_after_sigterm_another_replica_serves_before_the_lease_runs_out(
    namespace: Kubectl, replicas: tuple[OperatorProcess, OperatorProcess]
) -> None:
    leader, reserve = replicas
    assert seconds_until_served(namespace, leader, signal.SIGTERM) < lease.DURATION_SECONDS
    wait_until("the reserve ready", lambda: reserve.readiness() == "ok", timeout_seconds=20)
    assert leader.wait_ended() == 0


def test_a_leader_that_stands_still_is_replaced_and_ends(
    namespace: Kubectl, replicas: tuple[OperatorProcess, OperatorProcess]
) -> None:
    """As one whose node is lost: only the Lease tells of it."""
    leader, reserve = replicas
    seconds_until_served(namespace, leader, signal.SIGSTOP)
    before = leader.log
    os.kill(leader.pid, signal.SIGCONT)
    wait_until("the former leader ended", lambda: not leader.is_running)
    assert "this replica stands by" in leader.log.splitlines()[-1]
    assert "applied" not in leader.log.removeprefix(before)
    wait_until("the reserve ready", lambda: reserve.readiness() == "ok", timeout_seconds=20)
    assert "Traceback" not in leader.log + reserve.log
