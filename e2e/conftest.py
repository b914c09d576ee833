"""Fixtures of the tests that need a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests are imported by path; what they share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

import audit
import operator_process
import stack
from api import Api
from kube import Kubectl


@pytest.fixture(scope="session")
def target() -> stack.Target:
    """The cluster of the environment, or the local one."""
    return stack.Target.from_environment()


@pytest.fixture(scope="session")
def images(target: stack.Target) -> dict[str, str]:
    """References of the runtime's and the operator's image, built from this tree."""
    return stack.build_images(target)


@pytest.fixture(scope="session")
def crds(target: stack.Target) -> None:
    """The CRD of this tree, served."""
    stack.apply_crds(target.kubectl)
    stack.wait_for_crds(target.kubectl, "llmservices.pagoda.dev")


@pytest.fixture(scope="session")
def api(target: stack.Target, crds: None) -> Api:
    """The API server, for what asks it many times."""
    return Api.of(target.kubectl)


@pytest.fixture
def namespace(target: stack.Target, crds: None) -> Iterator[Kubectl]:
    """kubectl in a namespace of the test's own, deleted afterwards without waiting."""
    with stack.fresh_namespace(target.kubectl) as kubectl:
        yield kubectl


@pytest.fixture(scope="module")
def no_other_operator(target: stack.Target) -> Iterator[None]:
    """The installed operator stands still once for all tests of the module."""
    with operator_process.without_installed_operator(target.kubectl):
        yield


@pytest.fixture
def operator(
    namespace: Kubectl, no_other_operator: None, tmp_path: Path
) -> Iterator[operator_process.OperatorProcess]:
    """This tree's operator as a process that serves the test's namespace alone."""
    process = operator_process.OperatorProcess(namespace, tmp_path / "operator.log")
    with process.running():
        yield process


@pytest.fixture(scope="module")
def team(target: stack.Target, crds: None) -> Iterator[Kubectl]:
    """kubectl in a namespace of the module's own."""
    with stack.fresh_namespace(target.kubectl) as kubectl:
        yield kubectl


@pytest.fixture(scope="module")
def team_operator(
    team: Kubectl, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[operator_process.OperatorProcess]:
    """One operator for all tests of the module: each has a service of its own name."""
    log = tmp_path_factory.mktemp("operator") / "operator.log"
    with operator_process.OperatorProcess(team, log).running() as process:
        yield process
        assert "Traceback" not in process.log


@pytest.fixture(scope="session", autouse=True)
def since_the_start() -> audit.AuditLog | None:
    """The audit log of the whole run; none of a cluster that is not ours."""
    path = None if os.environ.get("CONTEXT") else Path(stack.cluster_paths()["audit_log"])
    return audit.AuditLog(path) if path and path.exists() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Last is what looks back at the others."""
    items.sort(key=lambda item: item.path.name == "test_rights.py")


@pytest.fixture
def audit_log() -> audit.AuditLog:
    """The API server's audit log, from now on."""
    return audit.AuditLog(Path(stack.cluster_paths()["audit_log"]))
