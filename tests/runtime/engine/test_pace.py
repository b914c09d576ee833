"""How long a phase of the start still takes."""

from __future__ import annotations

import pytest

from pagoda_runtime.engine.pace import Pace


def test_a_phase_goes_on_at_its_pace_so_far():
    pace = Pace()
    assert pace.seconds_left("load", 20.0, now=100.0) is None
    assert pace.seconds_left("load", 40.0, now=110.0) == pytest.approx(30.0)
    assert pace.seconds_left("load", 100.0, now=130.0) == 0.0


def test_another_phase_and_one_that_falls_back_begin_anew():
    pace = Pace()
    pace.seconds_left("download", 0.0, now=0.0)
    assert pace.seconds_left("download", 50.0, now=10.0) == pytest.approx(10.0)
    assert pace.seconds_left("download", 10.0, now=20.0) is None
    assert pace.seconds_left("load", 90.0, now=30.0) is None
    assert pace.seconds_left("load", 95.0, now=40.0) == pytest.approx(10.0)
