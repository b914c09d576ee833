"""From an LLMService to the manifests of its children.

Pure, and a contract: the same spec gives the same bytes in every release, because another pod
template would restart every engine when the operator is upgraded.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pagoda_operator.names import (
    API_VERSION,
    KIND,
    LABEL_REVISION,
    ChildRef,
    Manifest,
    common_labels,
    engine_name,
    selector_labels,
)
from pagoda_operator.spec import DType, KvCacheDtype, LLMService, Quantization

PORT = 8000
MODELS_PATH = "/models"
STARTUP_SECONDS = 3600
DRAIN_DELAY_SECONDS = 5
DRAIN_SECONDS = 30
# What the engine needs to end after its drain, before the kubelet kills it.
DRAIN_MARGIN_SECONDS = 10
# A pod may load for STARTUP_SECONDS; only then has the rollout failed.
PROGRESS_DEADLINE_SECONDS = STARTUP_SECONDS + 300
# The numeric user of the runtime image: the kubelet cannot check runAsNonRoot against a name.
USER_ID = 65532

DTYPE_FLAGS = {
    DType.BFLOAT16: "bfloat16",
    DType.FLOAT16: "float16",
    DType.FLOAT32: "float32",
}
QUANTIZATION_FLAGS = {
    Quantization.NONE: "none",
    Quantization.AWQ: "awq",
    Quantization.GPTQ: "gptq",
    Quantization.FP8: "fp8",
    Quantization.INT8: "int8",
    Quantization.INT4: "int4",
    Quantization.EXL2: "exl2",
    Quantization.COMPRESSED_TENSORS: "compressed-tensors",
}
KV_CACHE_DTYPE_FLAGS = {
    KvCacheDtype.FP8: "fp8",
    KvCacheDtype.FP8_E4M3: "fp8_e4m3",
    KvCacheDtype.FP8_E5M2: "fp8_e5m2",
    KvCacheDtype.INT8: "int8",
}


def render_children(service: LLMService, *, engine_image: str) -> dict[ChildRef, Manifest]:
    """Every child that the service should have, in the order in which they are applied.

    The Deployment has no `spec.replicas`: the plan adds it where the renderer has to send it.

    Args:
        engine_image: the image of engines whose spec names none.
    """
    children = (
        render_service_account(service),
        render_service(service),
        render_deployment(service, engine_image=engine_image),
    )
    return {ChildRef(child["kind"], child["metadata"]["name"]): child for child in children}


def render_service_account(service: LLMService) -> Manifest:
    """An account without rights, so that engines do not run as the namespace's default."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _metadata(service, engine_name(service.key.name)),
        "automountServiceAccountToken": False,
    }


def render_service(service: LLMService) -> Manifest:
    """The front door: what OpenAI clients in the cluster connect to."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(service, service.key.name),
        "spec": {
            "type": "ClusterIP",
            "selector": selector_labels(service.key.name),
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": PORT}],
        },
    }


def render_deployment(service: LLMService, *, engine_image: str) -> Manifest:
    """The engines."""
    template = _render_pod_template(service, engine_image)
    template["metadata"]["labels"][LABEL_REVISION] = _digest(template)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(service, engine_name(service.key.name)),
        "spec": {
            "selector": {"matchLabels": selector_labels(service.key.name)},
            "strategy": _render_strategy(service),
            "progressDeadlineSeconds": PROGRESS_DEADLINE_SECONDS,
            "revisionHistoryLimit": 3,
            "template": template,
        },
    }


def revision_of(deployment: Manifest) -> str:
    """The revision of the pods that a Deployment asks for."""
    labels = deployment["spec"]["template"]["metadata"].get("labels", {})
    return str(labels.get(LABEL_REVISION, ""))


def engine_args(service: LLMService) -> list[str]:
    """The arguments of the `pagoda` command; the runtime's CLI parses them (`tests/contract`)."""
    spec, engine = service.spec, service.spec.engine
    args = ["serve", "--model", _model_argument(spec.model.uri)]
    args += ["--served-model-name", service.model_name]
    args += ["--host", "0.0.0.0", "--port", str(PORT)]
    # Named, not detected: an engine that finds no GPU fails rather than crawls on the CPU.
    args += ["--device", "cuda" if spec.num_gpus else "cpu"]
    args += ["--tensor-parallel-size", str(engine.tensor_parallel_size)]
    if engine.dtype is not DType.AUTO:
        args += ["--dtype", DTYPE_FLAGS[engine.dtype]]
    if engine.quantization is not Quantization.AUTO:
        args += ["--quantization", QUANTIZATION_FLAGS[engine.quantization]]
    if engine.kv_cache_dtype is not KvCacheDtype.AUTO:
        args += ["--kv-cache-dtype", KV_CACHE_DTYPE_FLAGS[engine.kv_cache_dtype]]
    if engine.max_model_len is not None:
        args += ["--max-model-len", str(engine.max_model_len)]
    args += ["--max-num-seqs", str(engine.max_num_seqs)]
    args += ["--gpu-memory-utilization", f"{engine.gpu_memory_percent / 100:.2f}"]
    args += ["--enable-prefix-caching" if engine.prefix_caching else "--no-enable-prefix-caching"]
    args += ["--drain-delay-seconds", str(DRAIN_DELAY_SECONDS)]
    args += ["--drain-seconds", str(DRAIN_SECONDS)]
    return [*args, *engine.extra_args]


def model_claim(uri: str) -> str | None:
    """The PersistentVolumeClaim that a model uri names, if it names one."""
    if not uri.startswith("pvc://"):
        return None
    return uri.removeprefix("pvc://").split("/", 1)[0]


def _model_argument(uri: str) -> str:
    if not uri.startswith("pvc://"):
        return uri
    _, _, path = uri.removeprefix("pvc://").partition("/")
    return f"{MODELS_PATH}/{path}".rstrip("/")


def _metadata(service: LLMService, name: str) -> Manifest:
    return {
        "name": name,
        "namespace": service.key.namespace,
        "labels": common_labels(service.key.name),
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": service.key.name,
                "uid": service.uid,
                "controller": True,
                # true would need the right to write finalizers of LLMServices.
                "blockOwnerDeletion": False,
            }
        ],
    }


def _render_strategy(service: LLMService) -> Manifest:
    if service.spec.num_gpus:
        # The new pod of a surge needs a second set of GPUs and may wait for it for ever.
        return {"type": "Recreate"}
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def _render_pod_template(service: LLMService, engine_image: str) -> Manifest:
    return {
        "metadata": {"labels": common_labels(service.key.name)},
        "spec": {
            "serviceAccountName": engine_name(service.key.name),
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": (
                DRAIN_DELAY_SECONDS + DRAIN_SECONDS + DRAIN_MARGIN_SECONDS
            ),
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_render_container(service, engine_image)],
            "volumes": _render_volumes(service),
        },
    }


def _render_container(service: LLMService, engine_image: str) -> Manifest:
    mounts: list[Manifest] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "cache", "mountPath": "/cache"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if model_claim(service.spec.model.uri) is not None:
        mounts.append({"name": "models", "mountPath": MODELS_PATH, "readOnly": True})
    return {
        "name": "engine",
        "image": service.spec.engine.image or engine_image,
        "args": engine_args(service),
        "env": [
            {"name": "HOME", "value": "/cache"},
            {"name": "HF_HOME", "value": "/cache/huggingface"},
        ],
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": _render_resources(service),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "startupProbe": _render_probe("/startup", period=2, failures=STARTUP_SECONDS // 2),
        "readinessProbe": _render_probe("/ready", period=2, failures=3),
        # Longer than readiness: a busy engine leaves the Service before it is restarted.
        "livenessProbe": _render_probe("/health", period=10, failures=6),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def _render_probe(path: str, *, period: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": PORT},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _render_resources(service: LLMService) -> Manifest:
    resources = service.spec.resources
    requests: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    if resources.cpu is not None:
        # No limit: idle cores are of use to the tokenizer, and throttling delays every step.
        requests["cpu"] = str(resources.cpu)
    if resources.memory is not None:
        requests["memory"] = limits["memory"] = str(resources.memory)
    if service.spec.num_gpus:
        limits[resources.gpu.resource_name] = str(service.spec.num_gpus)
        requests[resources.gpu.resource_name] = str(service.spec.num_gpus)
    return {"requests": requests, "limits": limits}


def _render_volumes(service: LLMService) -> list[Manifest]:
    tensor_parallel_size = service.spec.engine.tensor_parallel_size
    # NCCL exchanges data between ranks through /dev/shm; its default of 64 MiB is too small.
    shm_mebibytes = 1024 * tensor_parallel_size if tensor_parallel_size > 1 else 256
    volumes: list[Manifest] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "cache", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_mebibytes}Mi"}},
    ]
    claim = model_claim(service.spec.model.uri)
    if claim is not None:
        source = {"claimName": claim, "readOnly": True}
        volumes.append({"name": "models", "persistentVolumeClaim": source})
    return volumes


def _digest(template: Manifest) -> str:
    canonical = json.dumps(template, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]
