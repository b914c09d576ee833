"""Of the rights that the chart gives, all the other tests together need every one, and no other.

Runs last (`conftest`): what is granted and never used is to go, or to get a test.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import stack
from audit import AuditLog, Request
from rights import ACCOUNT, chart_rules, granted, used

pytestmark = pytest.mark.cluster
# So long a process may go on after its rights were taken away, with the release it belonged to.
GRACE = timedelta(seconds=120)
# They are gone before the request that takes them away has finished.
LEAD = timedelta(seconds=1)


@pytest.fixture
def requests(request: pytest.FixtureRequest, since_the_start: AuditLog | None) -> list[Request]:
    """Those of operators in this run. A part of the tests tells nothing of the whole."""
    files = {item.path for item in request.session.items}
    if missing := set(Path(__file__).parent.glob("test_*.py")) - files:
        pytest.skip(f"needs all tests of e2e/ in this run, as {min(missing).name}")
    if since_the_start is None:
        pytest.skip("needs the audit log of a cluster that is ours")
    return since_the_start.requests_of_account(ACCOUNT)


def test_no_operator_was_denied_anything(
    requests: list[Request], since_the_start: AuditLog
) -> None:
    ends = [
        it.finished
        for it in since_the_start.read(b"rbac.authorization.k8s.io")
        if it.verb in ("delete", "deletecollection") and it.resource.endswith("bindings")
    ]
    denied = [
        f"{it.finished} {it.namespace} {it}"
        for it in requests
        if it.is_denied and not any(end - LEAD <= it.finished < end + GRACE for end in ends)
    ]
    assert requests
    assert not denied, "\n".join(denied)


def test_every_right_of_the_chart_was_used(target: stack.Target, requests: list[Request]) -> None:
    """Of one namespace, or of all: the rules are the same."""
    rules = granted(chart_rules(False))
    assert rules == granted(chart_rules(True))
    assert rules - used(requests) == set()
