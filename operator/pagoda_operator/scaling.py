"""How many replicas a service needs: a pure function of the demand it saw.

    demand   = requests that run + requests that wait, summed over the ready pods
    proposal = ceil(demand / (max_num_seqs + target_queue_depth)), at least min, at most max
    target   = the largest proposal of the last stabilization window

So the target rises at once and falls only when a whole window asked for less. Where the demand is
not known (a pod does not answer, none is ready, the operator was away), the proposal is at least
the present target: missing data never scales down, and a restart begins a new window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pagoda_operator.spec import LLMServiceSpec

MAX_SILENCE_SECONDS = 30.0
"""Without a sample for longer than this, what happened in between is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPolicy:
    """What of the spec decides on replicas."""

    min_replicas: int
    max_replicas: int
    demand_per_replica: int
    stabilization_seconds: float

    @classmethod
    def of(cls, spec: LLMServiceSpec) -> Self | None:
        """The policy of a spec; None where the number of replicas is fixed."""
        scaling = spec.autoscaling
        if spec.suspend or scaling is None or scaling.driver == "External":
            return None
        if scaling.min_replicas == scaling.max_replicas:
            return None
        return cls(
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            demand_per_replica=spec.engine.max_num_seqs + scaling.target_queue_depth,
            stabilization_seconds=scaling.scale_down.stabilization_seconds,
        )

    def clamp(self, replicas: int) -> int:
        """The nearest number of replicas that the policy allows."""
        return min(max(replicas, self.min_replicas), self.max_replicas)


@dataclass(frozen=True, slots=True)
class PodLoad:
    """What one engine says on `/load`."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What the next decision needs to know of the past.

    proposals: (time in seconds, replicas), oldest first; only those of the window, and of them
    only those that no later one exceeds.
    """

    target: int
    last_sample: float
    proposals: tuple[tuple[float, int], ...]

    @classmethod
    def start(cls, target: int, now: float) -> Self:
        """The state of an operator that has seen nothing: the target holds for one window."""
        return cls(target, now, ((now, target),))


def decide(
    state: ScalingState, loads: Sequence[PodLoad | None], policy: ScalingPolicy, now: float
) -> ScalingState:
    """The state after one look at the pods.

    Args:
        loads: one for each ready pod; None for a pod that did not answer.
        now: seconds of a monotonic clock, not before `state.last_sample`.
    """
    demand = sum(load.running + load.waiting for load in loads if load is not None)
    proposal = policy.clamp(-(-demand // policy.demand_per_replica))
    is_complete = bool(loads) and None not in loads
    if not is_complete or now - state.last_sample > MAX_SILENCE_SECONDS:
        proposal = policy.clamp(max(proposal, state.target))
    oldest = now - policy.stabilization_seconds
    kept = [(time, n) for time, n in state.proposals if time > oldest and n > proposal]
    kept.append((now, proposal))
    # The first one kept is the largest.
    return ScalingState(policy.clamp(kept[0][1]), now, tuple(kept))


def initial_target(spec: LLMServiceSpec, *, remembered: int, live: int) -> int:
    """The target of an operator that has not decided yet.

    Args:
        remembered: desiredReplicas of the status, 0 if there is none.
        live: replicas of the Deployment, 0 if there is none. It may be ahead of the status, if
            the operator was killed between the two writes; the larger one loses no request.
    """
    policy = ScalingPolicy.of(spec)
    return spec.min_replicas if policy is None else policy.clamp(max(remembered, live))
