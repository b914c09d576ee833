from __future__ import annotations

from pathlib import Path

import pytest
from cluster.buildah import verify_place
from cluster.settings import ClusterError


def test_a_cache_that_buildah_would_not_see_is_refused_with_the_remedy() -> None:
    with pytest.raises(ClusterError, match="PAGODA_CACHE"):
        verify_place(Path("/var/tmp/pagoda/cluster"))
    verify_place(Path("/var/tmpfs/pagoda"))
