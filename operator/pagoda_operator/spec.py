"""An LLMService as frozen values. The fields, enums and defaults are those of the CRD.

The API server has already refused what the CRD's schema and rules refuse, and filled the
defaults in. What is left for `parse` to refuse is an object that a different CRD let through.
Pure: no I/O, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pagoda_operator.decode import Part, build
from pagoda_operator.names import Key, Manifest

DType = Literal["Auto", "BFloat16", "Float16", "Float32"]
Quantization = Literal[
    "Auto", "None", "AWQ", "GPTQ", "FP8", "INT8", "INT4", "EXL2", "CompressedTensors", "GGUF"
]
KvCacheDtype = Literal["Auto", "FP8", "FP8E4M3", "FP8E5M2", "INT8"]
ScalingDriver = Literal["Operator", "External"]
ImagePolicy = Literal["Keep", "Follow"]
Strategy = Literal["Surge", "InPlace", "Recreate"]
RolloutStrategy = Literal["Auto", "Surge", "InPlace", "Recreate"]
MonitorKind = Literal["Auto", "None"]
UserFrom = Literal["Image", "Platform"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretRef:
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    uri: str
    name: str | None = None
    aliases: tuple[str, ...] = ()
    revision: str | None = None
    credentials_secret_ref: SecretRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    image: str | None = None
    image_policy: ImagePolicy = "Keep"
    dtype: DType = "Auto"
    tensor_parallel_size: int = 1
    quantization: Quantization = "Auto"
    kv_cache_dtype: KvCacheDtype = "Auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    gpu_memory_percent: int = 90
    prefix_caching: bool = True
    extra_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    count: int | None = None
    """None: as many as engine.tensor_parallel_size."""
    resource_name: str = "nvidia.com/gpu"
    products: tuple[str, ...] = ()
    claims: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    gpu: Gpu = field(default_factory=Gpu)
    cpu: int | float | str | None = None
    cpu_limit: int | float | str | None = None
    memory: int | str | None = None
    memory_request: int | str | None = None
    shared_memory: int | str | None = None
    ephemeral_storage: int | str | None = None
    queue_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleDown:
    stabilization_seconds: int = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaling:
    driver: ScalingDriver = "Operator"
    min_replicas: int = 1
    max_replicas: int
    target_queue_depth: int = 4
    scale_down: ScaleDown = field(default_factory=ScaleDown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    strategy: RolloutStrategy = "Auto"
    progress_deadline_seconds: int | None = None
    paused: bool = False

    @property
    def first_strategy(self) -> Strategy:
        """What Auto begins with; see `rollout`."""
        return "Surge" if self.strategy == "Auto" else self.strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifecycle:
    startup_timeout_seconds: int = 3600
    drain_seconds: int = 30
    stall_seconds: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disruption:
    min_available: int | str | None = None
    max_unavailable: int | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Auth:
    api_keys_secret_ref: SecretRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPath:
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheClaim:
    claim_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    size_limit: int | str = "200Gi"
    host_path: HostPath | None = None
    pvc: CacheClaim | None = None
    preload: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPolicy:
    enabled: bool = False
    from_: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Observability:
    monitor: MonitorKind = "Auto"
    prometheus_rule: bool = False
    labels: Part = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityContext:
    user_from: UserFrom = "Image"
    run_as_user: int | None = None
    run_as_group: int | None = None
    fs_group: int | None = None
    supplemental_groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PodTemplate:
    """What the user adds to the pods; all else of them is the operator's."""

    labels: Part = field(default_factory=dict)
    annotations: Part = field(default_factory=dict)
    image_pull_secrets: tuple[Part, ...] = ()
    node_selector: Part = field(default_factory=dict)
    tolerations: tuple[Part, ...] = ()
    affinity: Part = field(default_factory=dict)
    topology_spread_constraints: tuple[Part, ...] = ()
    priority_class_name: str | None = None
    runtime_class_name: str | None = None
    scheduler_name: str | None = None
    env: tuple[Part, ...] = ()
    env_from: tuple[Part, ...] = ()
    volumes: tuple[Part, ...] = ()
    volume_mounts: tuple[Part, ...] = ()
    security_context: SecurityContext = field(default_factory=SecurityContext)


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMServiceSpec:
    model: Model
    engine: Engine = field(default_factory=Engine)
    resources: Resources = field(default_factory=Resources)
    replicas: int = 1
    autoscaling: Autoscaling | None = None
    rollout: Rollout = field(default_factory=Rollout)
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    disruption: Disruption = field(default_factory=Disruption)
    auth: Auth = field(default_factory=Auth)
    cache: Cache = field(default_factory=Cache)
    network_policy: NetworkPolicy = field(default_factory=NetworkPolicy)
    observability: Observability = field(default_factory=Observability)
    pod_template: PodTemplate = field(default_factory=PodTemplate)
    suspend: bool = False

    @property
    def num_gpus(self) -> int:
        """GPUs of one replica; 0 is an engine on the CPU."""
        count = self.resources.gpu.count
        return self.engine.tensor_parallel_size if count is None else count

    @property
    def max_replicas(self) -> int:
        """The most replicas that there can be, where the service is not suspended."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @property
    def min_replicas(self) -> int:
        """The number of replicas below which the service is not what its spec asks for."""
        if self.suspend:
            return 0
        if self.autoscaling is None:
            return self.replicas
        least = self.autoscaling.min_replicas
        if self.autoscaling.driver == "Operator":
            return least
        return min(max(self.replicas, least), self.autoscaling.max_replicas)


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMService:
    """The parts of the object that the plan needs."""

    key: Key
    uid: str
    generation: int
    spec: LLMServiceSpec

    @property
    def model_name(self) -> str:
        """The name that requests give as `model`."""
        return self.spec.model.name or self.key.name


def parse(manifest: Manifest) -> LLMService:
    """The LLMService in a manifest as the API server returns it.

    Raises:
        SpecError: a field is unknown, missing or of the wrong type.
    """
    metadata = manifest["metadata"]
    return LLMService(
        key=Key.of(manifest),
        uid=metadata["uid"],
        generation=metadata["generation"],
        spec=build(LLMServiceSpec, manifest.get("spec"), "spec"),
    )
