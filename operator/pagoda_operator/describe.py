"""What `pagoda-operator status` says of an LLMService that there is. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

from pagoda_operator.causes import is_ready
from pagoda_operator.forecast import Paint, section
from pagoda_operator.names import Key, Manifest, find_condition, is_leaving

MAX_EVENTS = 5
_CONDITIONS = ("Ready", "Available", "Reconciling", "Stalled")
# A condition that is as it should be when the service is well.
_GOOD = {"Ready": "True", "Available": "True", "Reconciling": "False", "Stalled": "False"}
_AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def describe_service(
    service: Manifest,
    pods: Sequence[Manifest],
    events: Sequence[Manifest],
    now: datetime,
    paint: Paint,
) -> Iterator[str]:
    """The text for a person.

    Args:
        events: warnings about the pods.
        now: in UTC.
    """
    status, model = service.get("status", {}), service["spec"]["model"]["uri"]
    yield f"{paint(f'LLMService {Key.of(service)}', 'bold')} of {model}"
    if not _is_current(service):
        yield paint("The operator has not seen this spec yet: is it running?", "yellow")
    yield from section("Replicas", _describe_replicas(status), paint)
    yield from section("Rollout", _describe_rollout(status.get("rollout", {}), paint), paint)
    yield from section("Conditions", _describe_conditions(status, now, paint), paint)
    yield from section("Model", _describe_model(status.get("model", {})), paint)
    yield from section("Before the start", _describe_preflight(status, paint), paint)
    yield from section("Pods", (_describe_pod(pod, now, paint) for pod in pods), paint)
    yield from section("Warnings", _describe_events(events, now), paint)


def is_well(service: Manifest) -> bool:
    """Whether the spec is in force."""
    ready = find_condition(service.get("status", {}), "Ready")
    return _is_current(service) and ready.get("status") == "True"


def _is_current(service: Manifest) -> bool:
    seen = service.get("status", {}).get("observedGeneration", -1)
    return bool(seen >= service["metadata"]["generation"])


def _describe_replicas(status: Manifest) -> Iterator[str]:
    if "summary" in status:
        yield f"{status['summary']} ready, {status.get('updatedReplicas', 0)} of this spec"
    if "url" in status:
        yield f"{status['url']} with model {status.get('modelName', '')}"


def _describe_rollout(rollout: Manifest, paint: Paint) -> Iterator[str]:
    """What is not as always: a choice that waits or was made, and an image that is kept."""
    if rollout.get("reason", "Preferred") not in ("Preferred", "AsSpecified"):
        yield f"{rollout['strategy']}: {_one_line(rollout['message'])}"
    if "newerImage" in rollout:
        newer = _one_line(rollout["newerImage"])
        yield paint(f"the engines run an older image than the operator's: {newer}", "yellow")
        yield "the next change of their pods brings it, or engine.imagePolicy: Follow at once"


def _describe_conditions(status: Manifest, now: datetime, paint: Paint) -> Iterator[str]:
    others = [it["type"] for it in status.get("conditions", []) if it["type"] not in _CONDITIONS]
    for kind in (*_CONDITIONS, *others):
        if not (found := find_condition(status, kind)):
            continue
        value = found["status"]
        is_good = value == _GOOD.get(kind, value)
        style = "green" if is_good else "yellow" if kind == "Reconciling" else "red"
        age = _age(found["lastTransitionTime"], now)
        yield f"{kind:<12} {paint(f'{value:<7}', style)} {found['reason']}, for {age}"
        if not is_good or (kind == "Ready" and found["reason"] != "Serving"):
            yield f"{'':<12} {_one_line(found['message'])}"


def _describe_model(model: Manifest) -> Iterator[str]:
    if model:
        ranks = model.get("tensorParallelSize", 1)
        yield (
            f"{model.get('architecture')}, quantization {model.get('quantization')}, KV cache "
            f"{model.get('kvCacheDtype')}, {ranks} {'rank' if ranks == 1 else 'ranks'}"
        )


def _describe_preflight(status: Manifest, paint: Paint) -> Iterator[str]:
    found = status.get("preflight", {})
    if not found:
        return
    sizes = ""
    if "gpu" in found:
        sizes = f" on {found['gpu']}: weights {found['weights']}, KV cache {found['kvCache']} for "
        sizes += f"{found['kvCacheTokens']:,} tokens, or {found['concurrentRequests']} requests "
        sizes += f"of {found['maxModelLen']:,}"
    yield f"{found['result']}{sizes}"
    yield from (paint(_one_line(text), "yellow") for text in found.get("warnings", []))


def _describe_pod(pod: Manifest, now: datetime, paint: Paint) -> str:
    metadata, status = pod["metadata"], pod.get("status", {})
    containers = status.get("containerStatuses", [])
    state = "ending" if is_leaving(pod) else status.get("phase", "Unknown")
    if is_ready(pod) and not is_leaving(pod):
        state = "ready"
    waiting = (it.get("state", {}).get("waiting", {}).get("reason") for it in containers)
    state = next(filter(None, waiting), state)
    restarts = sum(it.get("restartCount", 0) for it in containers)
    node = pod.get("spec", {}).get("nodeName", "no node")
    age = _age(metadata.get("creationTimestamp"), now)
    style = "green" if state == "ready" else "yellow"
    return f"{metadata['name']}  {paint(state, style)}, {restarts} restarts, {node}, {age}"


def _describe_events(events: Iterable[Manifest], now: datetime) -> Iterator[str]:
    """The latest ones, each once."""

    def time_of(event: Manifest) -> str:
        return str(event.get("lastTimestamp") or event.get("eventTime") or "")

    for event in sorted(events, key=time_of, reverse=True)[:MAX_EVENTS]:
        pod = event.get("involvedObject", {}).get("name", "")
        text = _one_line(event.get("message"))
        yield f"{event.get('reason')} {_age(time_of(event), now)} ago, {pod}: {text}"


def _one_line(text: object) -> str:
    """Without what a terminal would obey: some of it comes out of pods."""
    shown = "".join(char if char.isprintable() else " " for char in str(text))
    return " ".join(shown.split())


def _age(since: object, now: datetime) -> str:
    """In the largest unit of which there is one."""
    try:
        seconds = max(0.0, (now - datetime.fromisoformat(str(since))).total_seconds())
    except (ValueError, TypeError):
        return "?"
    size, unit = next(((size, unit) for size, unit in _AGES if seconds >= size), (1, "s"))
    return f"{int(seconds // size)} {unit}"
