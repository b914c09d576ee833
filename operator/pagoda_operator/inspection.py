"""A Job that reads a model which only pods reach: on a claim, on a web server, or at
a hub with a token. Pure.

It takes no GPU, runs the operator's image, and tells what it found in one line of JSON, its
termination message. The operator so reads no Secret and mounts no claim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pagoda_operator.checkpoint import (
    Checkpoint,
    CheckpointError,
    Tensors,
    read_checkpoint,
    read_index,
)
from pagoda_operator.child import render_child
from pagoda_operator.flags import model_argument, model_claim
from pagoda_operator.names import LABEL_MANAGED_BY, MANAGED_BY, Manifest, digest
from pagoda_operator.pod import MODELS_VOLUME, render_pull_template
from pagoda_operator.spec import LLMService

HF, HTTPS = "hf://", "https://"
DEADLINE_SECONDS = 60
"""From its creation; an image that is still pulled then has to be there at the next attempt."""
KEPT_SECONDS = 300
"""That a Job stays which no operator has deleted."""
RESOURCES = {
    "requests": {"cpu": "50m", "memory": "64Mi"},
    "limits": {"memory": "256Mi"},
}
_VOLUMES = ("tmp", MODELS_VOLUME)
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    "dtype": "dtype",
}
"""Keys of a config.json → fields of a Checkpoint"""


def is_for_job(service: LLMService) -> bool:
    """Whether only a pod can read the model."""
    model = service.spec.model
    if model.uri.startswith(HF):
        return model.credentials_secret_ref is not None
    return model.uri.startswith(HTTPS) or model_claim(model.uri) is not None


def render_inspection(service: LLMService, image: str) -> Manifest:
    """The Job; another model, token or image has another name."""
    spec, key = service.spec, service.key
    args = ["inspect", model_argument(spec.model.uri)]
    if spec.model.revision is not None:
        args += ["--revision", spec.model.revision]
    pod = render_pull_template(service, image, args)["spec"]
    (container,) = pod["containers"]
    mounts = [it for it in container["volumeMounts"] if it["name"] in _VOLUMES]
    changed = {"name": "inspect", "image": image, "resources": RESOURCES, "volumeMounts": mounts}
    pod = {name: value for name, value in pod.items() if name != "topologySpreadConstraints"} | {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 5,
        "containers": [{**container, **changed, "terminationMessagePolicy": "File"}],
        "volumes": [it for it in pod["volumes"] if it["name"] in _VOLUMES],
    }
    # Not those of the engines: its pod is none of them.
    labels = {LABEL_MANAGED_BY: MANAGED_BY}
    job = render_child(
        service,
        "Job",
        spec={
            "backoffLimit": 0,
            "activeDeadlineSeconds": DEADLINE_SECONDS,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    )
    job["metadata"]["name"] = f"{key.name}-check-{digest({'pod': pod, 'uid': service.uid})[:6]}"
    job["metadata"]["labels"] = labels
    return job


def tell(config: object, tensors: Tensors) -> str:
    """The line of a Job that has read a model."""
    try:
        return json.dumps(asdict(read_checkpoint(config, tensors)))
    except CheckpointError as error:
        return json.dumps({"reason": error.reason, "message": str(error)})


def hear(line: str) -> Checkpoint | CheckpointError | None:
    """What a Job told; None if it is nothing of the kind. Pods are not trusted."""
    try:
        found = json.loads(line)
        if "reason" in found:
            refused = ("InvalidModelConfig", "UnsupportedArchitecture")
            reason, message = str(found["reason"]), str(found["message"])
            return CheckpointError(reason, message) if reason in refused else None
        size = read_index({"metadata": {"total_size": found["stored_bytes"]}})
        return read_checkpoint(_config_of(found), size)
    except (ValueError, TypeError, KeyError, RecursionError, CheckpointError):
        return None


def _config_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says of a model what the Job found."""
    config = {key: found[field] for key, field in _FIELDS.items()}
    config["architectures"] = [found["architecture"]]
    if (stored := found["quantization"]) is not None:
        groups = enumerate(stored["group_sizes"])
        kind = stored["kv_cache_dtype"]
        scheme = {"type": "int" if kind == "int8" else "float"}
        config["quantization_config"] = {
            "quant_method": stored["method"],
            "config_groups": {str(i): {"weights": {"group_size": size}} for i, size in groups},
            "kv_cache_scheme": None if kind is None else scheme,
        }
    return config
