"""What tests of the reconciler share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pagoda_operator.poll import Poller
from pagoda_operator.testing import MemoryCluster, make_poller


@pytest.fixture
def cluster() -> MemoryCluster:
    return MemoryCluster()


@pytest.fixture
async def poller() -> AsyncIterator[Poller]:
    made = make_poller()
    yield made
    await made.close()
