"""The pod of an engine: from an LLMService to a pod template. Pure."""

from __future__ import annotations

from typing import Any

from pagoda_operator.flags import (
    DRAIN_DELAY_SECONDS,
    DRAIN_SECONDS,
    MODELS_PATH,
    PORT,
    engine_args,
    model_claim,
)
from pagoda_operator.names import Manifest, common_labels, engine_name
from pagoda_operator.spec import LLMService

STARTUP_SECONDS = 3600
# What the engine needs to end after its drain, before the kubelet kills it.
DRAIN_MARGIN_SECONDS = 10
# The numeric user of the runtime image: the kubelet cannot check runAsNonRoot against a name.
USER_ID = 65532


def render_pod_template(service: LLMService, engine_image: str) -> Manifest:
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
