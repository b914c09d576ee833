"""The bench: a control plane, its world, operators behind proxies; and one run of one case."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import stack
import yaml
from cluster.control_plane import control_plane
from cluster.lifecycle import paths
from cluster.settings import environment_settings

from faults.api import Api
from faults.operators import RIGHTS_NAMESPACE, Operator, Zygote, make_namespace
from faults.oracles import find_violations
from faults.plan import Shot, Target
from faults.proxy import FaultProxy
from faults.scenarios import Case, Scenario, state_of
from faults.world import World, wait_until

CONVERGE_SECONDS = 180.0
HOLD_SECONDS = 0.5


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One run. seconds: from the restart or the end of the fault, or the last act of the user if
    that was later, until everything was as without the fault."""

    scenario: str
    fault: str
    point: str
    is_run: bool = True
    is_reached: bool = True
    is_late: bool = False
    seconds: float = 0.0
    restarts: int = 0
    problems: list[str] = field(default_factory=list)

    @classmethod
    def left_out(cls, scenario: str, fault: str, point: str) -> Outcome:
        """A run for which there was no time."""
        return cls(scenario=scenario, fault=fault, point=point, is_reached=False, is_run=False)

    def show(self) -> None:
        """Print it if it did not go well, while others still run."""
        if self.problems or self.is_late:
            told = f"{self.seconds} s, {self.problems}"
            print(f"{self.scenario}, {self.fault} at {self.point}: {told}", flush=True)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Reference:
    """A run without a fault. Its requests are those from when the user acted."""

    state: str
    num_pods: int
    first_reads: tuple[Target, ...]
    num_writes: int


@dataclass(slots=True)
class Bench:
    """What all runs share."""

    api: Api
    world: World
    zygote: Zygote
    rights: list[dict[str, Any]]
    folder: Path
    references: dict[str, Reference] = field(default_factory=dict)
    deadline: float = float("inf")
    """Of a monotonic clock: runs that would begin later are left out, and counted."""
    _run: str = field(default_factory=lambda: uuid.uuid4().hex[:4])
    """Of this bench: another one on the same control plane has other names."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @asynccontextmanager
    async def operator(self, namespace: str, **options: Any) -> AsyncIterator[Operator]:
        """A ready operator of a namespace; the record is checked by `audit`."""
        token = await make_namespace(self.api, namespace, self.rights)
        async with (
            FaultProxy(self.api) as proxy,
            Operator(self.zygote, proxy, namespace, token, options) as operator,
        ):
            await operator.wait_ready()
            yield operator

    def case(self, namespace: str, prefix: str) -> Case:
        return Case(self.api, self.world, namespace, f"{prefix}-{self._run}-{next(self._numbers)}")

    def audit(self, operator: Operator) -> list[str]:
        """What the record and the log of an operator show that must not be."""
        services = {it.service for it in operator.proxy.record if it.resource == "llmservices"}
        proxy, namespace = operator.proxy, operator.namespace
        return find_violations(proxy.record, namespace, services, operator.log, proxy.told)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    async def refer(self, scenarios: Sequence[Scenario]) -> None:
        """Run each scenario without a fault, unless it was."""
        missing = [it for it in scenarios if it.name not in self.references]
        if missing:
            async with self.operator("reference") as operator:
                await asyncio.gather(*(self._refer(operator, it) for it in missing))

    async def _refer(self, operator: Operator, scenario: Scenario) -> None:
        case = self.case(operator.namespace, "r")
        await scenario.prepare(case)
        await asyncio.sleep(1.5)
        first = len(operator.proxy.record)
        await scenario.act(case)
        await wait_until(lambda: scenario.goal(case), CONVERGE_SECONDS, scenario.name)
        await asyncio.sleep(2.5)
        requests = operator.proxy.of_service(case.name, first)
        self.references[scenario.name] = Reference(
            state=state_of(case),
            num_pods=self.world.num_pods_made(case.namespace, case.name),
            first_reads=tuple(dict.fromkeys(it.target for it in requests if not it.is_write)),
            num_writes=sum(it.is_write for it in requests),
        )
        await case.delete()

    async def run(
        self,
        operator: Operator,
        scenario: Scenario,
        shot: Callable[[str], Shot] | None,
        point: str,
        limit_seconds: float,
    ) -> Outcome:
        """One case with one fault.

        Args:
            shot: makes the fault for the service of the name; None: no request fails.
            limit_seconds: how long it may take to be as without the fault.
        """
        case = self.case(operator.namespace, "c")
        armed = Shot(matches=lambda _: False, nth=1, kind="delay")
        armed = armed if shot is None else shot(case.name)
        outcome = Outcome(scenario=scenario.name, fault=armed.kind, point=point)
        lives = len(operator.lives)
        try:
            await scenario.prepare(case)
            with operator.proxy.armed(armed):
                await scenario.act(case)
                acted = time.monotonic()
                converged = await self._converge(case, scenario)
            if armed.fired is not None and armed.kind.startswith("kill"):
                # What the last write left may be right before the next process is there.
                await wait_until(lambda: len(operator.lives) > lives, CONVERGE_SECONDS, "a life")
        except TimeoutError as error:
            outcome.problems.append(str(error))
            acted = converged = time.monotonic()
        outcome.is_reached = armed.fired is not None or shot is None
        outcome.restarts = len(operator.lives) - lives
        begin = operator.lives[-1].started if outcome.restarts else armed.over_at
        outcome.seconds = round(max(converged - max(begin, acted), 0.0), 2)
        outcome.is_late = outcome.seconds > limit_seconds
        reference = self.references[scenario.name]
        pods = self.world.num_pods_made(case.namespace, case.name)
        if pods > reference.num_pods:
            outcome.problems.append(f"{pods} pods were made; {reference.num_pods} without a fault")
        await case.delete()
        outcome.show()
        return outcome

    async def _converge(self, case: Case, scenario: Scenario) -> float:
        """Wait for the state of the run without a fault. Raises: TimeoutError, with both."""
        reference = self.references[scenario.name]
        deadline = time.monotonic() + CONVERGE_SECONDS
        while True:
            await wait_until(lambda: scenario.goal(case), deadline - time.monotonic(), _tell(case))
            at = time.monotonic()
            while state_of(case) != reference.state:
                if time.monotonic() > deadline:
                    raise TimeoutError(_differ(reference.state, state_of(case)))
                await asyncio.sleep(0.1)
                at = time.monotonic()
            # It has to stay as it is.
            await asyncio.sleep(HOLD_SECONDS)
            if state_of(case) == reference.state:
                return at


def _tell(case: Case) -> str:
    return f"{case.name} is {json.dumps(case.service.get('status', {}).get('conditions'))}"


def _differ(wanted: str, found: str) -> str:
    """The first place where two states differ."""
    pairs = enumerate(itertools.zip_longest(wanted, found))
    at = next((index for index, (one, other) in pairs if one != other), 0)
    start = max(at - 200, 0)
    return f"not as without a fault: …{wanted[start : at + 150]}… is …{found[start : at + 150]}…"


def writes_of(service: str) -> Callable[[Any], bool]:
    return lambda request: request.is_write and request.service == service


@asynccontextmanager
async def make_bench(folder: Path, kubeconfig: Path, helm: str) -> AsyncIterator[Bench]:
    """A bench on a control plane that is up and has no node."""
    api = Api(kubeconfig)
    try:
        crd = yaml.safe_load((stack.ROOT / "crds/llmservice.yaml").read_text())
        await api.create(crd, may_exist=True)
        await api.wait_served("LLMService")
        async with World(api) as world, Zygote(folder) as zygote:
            yield Bench(api, world, zygote, rights_of_chart(helm), folder)
    finally:
        await api.close()


def rights_of_chart(helm: str) -> list[dict[str, Any]]:
    """The ServiceAccount and the Role of an operator of one namespace."""
    command = [helm, "template", "pagoda", str(stack.CHART), "--namespace", RIGHTS_NAMESPACE]
    command += ["--set", f"watchNamespace={RIGHTS_NAMESPACE}"]
    command += ["--show-only", "templates/rbac.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


@contextmanager
def control_plane_in(folder: Path) -> Iterator[dict[str, str]]:
    """A control plane for the bench; the paths of its files."""
    settings = replace(environment_settings(), state=folder)
    with control_plane(settings) as found:
        yield {key: str(value) for key, value in paths(found).items()}
