"""What `pagoda-operator plan` says of an LLMService before there is one. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pagoda_operator.checkpoint import Checkpoint
from pagoda_operator.names import ChildRef
from pagoda_operator.preflight import Preflight, gib
from pagoda_operator.sizing import Fit, block_bytes, block_size, weight_bytes
from pagoda_operator.spec import LLMService

Paint = Callable[[str, str], str]
"""A text in a style: bold, red, yellow, green or dim."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one service.

    checkpoint: None where the model's files were not read; then `warnings` say why.
    """

    service: LLMService
    children: Iterable[ChildRef]
    checkpoint: Checkpoint | None
    preflight: Preflight

    def lines(self, paint: Paint) -> Iterator[str]:
        """The text for a person."""
        service = self.service
        yield paint(f"LLMService {service.key}", "bold") + f" of {service.spec.model.uri}"
        yield from section("Objects", [str(ref) for ref in self.children], paint)
        yield from section("Pods", _describe_pods(service), paint)
        if self.preflight.fit is not None:
            yield from section("Memory of each GPU", _describe_fit(self.preflight.fit), paint)
        elif self.checkpoint is not None:
            yield from section("Memory", _describe_model(service, self.checkpoint), paint)
        yield from section("Requests", _describe_requests(service, self.preflight.fit), paint)
        warnings = [paint(text, "yellow") for text in self.preflight.warnings]
        yield from section("Warnings", warnings, paint)
        problems = [paint(f"{p.reason}: {p.message}", "red") for p in self.preflight.problems]
        yield from section("Problems", problems, paint)


def section(title: str, lines: Iterable[str], paint: Paint) -> Iterator[str]:
    """A title with its lines; nothing if there are none."""
    lines = list(lines)
    if lines:
        yield paint(title, "bold")
        yield from (f"  {line}" for line in lines)


def _describe_pods(service: LLMService) -> Iterator[str]:
    spec = service.spec
    least, most = spec.min_replicas, spec.min_replicas
    if spec.autoscaling is not None and not spec.suspend:
        most = spec.autoscaling.max_replicas
    count = f"{least}" if least == most else f"{least} to {most}"
    each = ["CPU only"]
    if spec.num_gpus:
        products = " or ".join(spec.resources.gpu.products)
        each = [f"{spec.num_gpus} × {spec.resources.gpu.resource_name} {products}".rstrip()]
    for name in ("cpu", "memory"):
        if (amount := getattr(spec.resources, name)) is not None:
            each.append(f"{name} {amount}")
    yield f"{count} {'replica' if count == '1' else 'replicas'}, each with {', '.join(each)}"
    if spec.num_gpus and most > 1:
        yield f"{most * spec.num_gpus} GPUs in all{'' if least == most else ' at most'}"
    rollout = {
        "Auto": "a new pod starts beside an old one; where it finds no room, an old one ends first",
        "Surge": "a new pod starts beside an old one",
        "InPlace": "an old pod ends first, one at a time",
        "Recreate": "all old pods end first",
    }
    yield f"changes: {rollout[spec.rollout.strategy]} ({spec.rollout.strategy})"


def _describe_fit(fit: Fit) -> Iterator[str]:
    yield f"{fit.gpu.name}: {gib(fit.gpu.total_bytes)}, of which {gib(fit.usable_bytes)} are used"
    yield f"{gib(fit.weight_bytes):>12}  weights"
    yield f"{gib(fit.overhead_bytes):>12}  steps, graphs and CUDA (estimated)"
    if fit.block_bytes:
        tokens = f"{fit.num_tokens:,} tokens, {fit.block_bytes // fit.block_size // 1024} KiB each"
        yield f"{gib(max(0, fit.cache_bytes)):>12}  KV cache: {tokens}"


def _describe_model(service: LLMService, checkpoint: Checkpoint) -> Iterator[str]:
    engine = service.spec.engine
    if (weights := weight_bytes(checkpoint, engine)) is not None:
        yield f"{gib(weights):>12}  weights of each of {engine.tensor_parallel_size} ranks"
    if of_block := block_bytes(checkpoint, engine):
        yield f"{of_block // block_size(engine) // 1024:>8} KiB  KV cache for a token"


def _describe_requests(service: LLMService, fit: Fit | None) -> Iterator[str]:
    yield f"{service.spec.engine.max_num_seqs} at a time for each replica (engine.maxNumSeqs)"
    if fit is not None and fit.block_bytes:
        yield f"{fit.num_requests} of them with {fit.max_model_len:,} tokens fit the KV cache"
