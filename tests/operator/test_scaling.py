"""The autoscaler's decisions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pagoda_operator.scaling import (
    PodLoad,
    ScalingPolicy,
    ScalingState,
    decide,
    initial_target,
)
from pagoda_operator.testing import make_service

POLICY = ScalingPolicy(
    min_replicas=1, max_replicas=4, demand_per_replica=20, stabilization_seconds=10.0
)


def run(samples: list[tuple[float, list[PodLoad | None]]], start: int = 1) -> list[int]:
    state, targets = ScalingState.start(start, 0.0), []
    for now, loads in samples:
        state = decide(state, loads, POLICY, now)
        targets.append(state.target)
    return targets


def test_forty_requests_make_two_replicas_at_once() -> None:
    assert run([(1.0, [PodLoad(16, 24)])]) == [2]


def test_demand_far_above_the_bound_stops_at_the_bound() -> None:
    assert run([(1.0, [PodLoad(256, 10_000)])]) == [4]


def test_replicas_go_only_after_a_whole_window_of_less_demand() -> None:
    idle: list[PodLoad | None] = [PodLoad(0, 0), PodLoad(0, 0)]
    times = [float(second) for second in range(2, 16, 2)]
    targets = run([(1.0, [PodLoad(16, 24)])] + [(now, idle) for now in times])
    assert targets == [2, 2, 2, 2, 2, 2, 1, 1]


def test_a_peak_within_the_window_keeps_its_replicas() -> None:
    idle: list[PodLoad | None] = [PodLoad(0, 0)]
    samples = [(1.0, [PodLoad(16, 60)]), (5.0, idle), (8.0, [PodLoad(16, 24)]), (12.0, idle)]
    assert run(samples) == [4, 4, 4, 2]


def test_a_restarted_operator_waits_for_a_window_of_its_own() -> None:
    idle: list[PodLoad | None] = [PodLoad(0, 0)]
    assert run([(2.0, idle), (9.0, idle), (10.0, idle)], start=3) == [3, 3, 1]


def test_a_pod_that_does_not_answer_never_scales_down_but_the_others_scale_up() -> None:
    silent: list[PodLoad | None] = [PodLoad(0, 0), None]
    assert run([(float(second), silent) for second in range(0, 60, 5)], start=2) == [2] * 12
    assert run([(1.0, [PodLoad(20, 40), None])], start=2) == [3]


def test_no_ready_pod_never_scales_down() -> None:
    assert run([(float(second), []) for second in range(0, 60, 5)], start=3) == [3] * 12


def test_a_long_silence_begins_a_new_window() -> None:
    idle: list[PodLoad | None] = [PodLoad(0, 0)]
    assert run([(2.0, idle), (100.0, idle), (104.0, idle), (111.0, idle)], start=3) == [3, 3, 3, 1]


loads = st.lists(
    st.none() | st.builds(PodLoad, st.integers(0, 10**6), st.integers(0, 10**6)), max_size=5
)


@given(
    low=st.integers(1, 50),
    span=st.integers(1, 50),
    per_replica=st.integers(1, 300),
    window=st.floats(0, 600),
    start=st.integers(0, 200),
    steps=st.lists(st.tuples(st.floats(0, 100), loads), max_size=30),
)
def test_the_target_is_always_within_its_bounds(
    low: int,
    span: int,
    per_replica: int,
    window: float,
    start: int,
    steps: list[tuple[float, list[PodLoad | None]]],
) -> None:
    policy = ScalingPolicy(
        min_replicas=low,
        max_replicas=low + span,
        demand_per_replica=per_replica,
        stabilization_seconds=window,
    )
    now = 0.0
    state = ScalingState.start(policy.clamp(start), now)
    for pause, sample in steps:
        now += pause
        before, state = state, decide(state, sample, policy, now)
        assert low <= state.target <= low + span
        assert all(n <= state.proposals[0][1] for _, n in state.proposals)
        if state.target < before.target:
            assert sample
            assert None not in sample


def test_the_first_target_is_the_larger_of_status_and_deployment() -> None:
    spec = make_service({"autoscaling": {"minReplicas": 1, "maxReplicas": 8}}).spec
    assert initial_target(spec, remembered=3, live=5) == 5
    assert initial_target(spec, remembered=3, live=0) == 3
    assert initial_target(spec, remembered=0, live=0) == 1
    assert initial_target(spec, remembered=20, live=20) == 8


def test_a_fixed_or_suspended_number_of_replicas_asks_nobody() -> None:
    assert initial_target(make_service({"replicas": 3}).spec, remembered=7, live=7) == 3
    assert initial_target(make_service({}).spec, remembered=7, live=7) == 1
    suspended = {"autoscaling": {"maxReplicas": 8}, "suspend": True}
    assert initial_target(make_service(suspended).spec, remembered=7, live=7) == 0
    assert ScalingPolicy.of(make_service(suspended).spec) is None


def test_the_capacity_of_a_replica_is_its_slots_and_the_tolerated_queue() -> None:
    spec = {
        "engine": {"maxNumSeqs": 16},
        "autoscaling": {"maxReplicas": 2, "targetQueueDepth": 4},
    }
    policy = ScalingPolicy.of(make_service(spec).spec)
    assert policy is not None
    assert policy.demand_per_replica == 20
    assert policy.stabilization_seconds == 300
