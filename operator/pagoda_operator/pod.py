"""The pod of an engine: from an LLMService to a pod template. Pure.

What the user adds (`spec.podTemplate`) comes beside what is the operator's; where both have a word
for the same thing, the CRD has refused the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pagoda_operator.decode import Part
from pagoda_operator.flags import (
    API_KEYS_PATH,
    DRAIN_DELAY_SECONDS,
    MODELS_PATH,
    PORT,
    engine_args,
    model_claim,
)
from pagoda_operator.names import (
    LABEL_QUEUE,
    Manifest,
    common_labels,
    engine_name,
    selector_labels,
)
from pagoda_operator.spec import Cache, LLMService, PodTemplate, SecurityContext

# What the engine needs to end after its drain, before the kubelet kills it.
DRAIN_MARGIN_SECONDS = 10
# The numeric user of the runtime image: the kubelet cannot check runAsNonRoot against a name.
USER_ID = 65532
# Compiled kernels and sockets; what is large goes to the cache.
TMP_SIZE_LIMIT = "4Gi"
ENGINE = "engine"
"""The container of the engine."""
CACHE_PATH = "/cache"
HUB_TOKEN = "HF_TOKEN"
# Variables of the engine by the scheme of model.uri, each from the Secret's key of its name.
CREDENTIALS = {
    "hf": (HUB_TOKEN,),
    "https": ("PAGODA_MODEL_TOKEN",),
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "gs": ("GS_ACCESS_KEY_ID", "GS_SECRET_ACCESS_KEY"),
    "oci": ("DOCKER_AUTH_CONFIG",),
}
# What `kubectl create secret docker-registry` calls it.
SECRET_KEYS = {"DOCKER_AUTH_CONFIG": ".dockerconfigjson"}
MODELS_VOLUME = "models"
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
# What GPU feature discovery calls the GPUs of a node.
PRODUCT_LABEL = "nvidia.com/gpu.product"
# Code compiled for the GPU outlives a restart of the container, as the cache does.
GPU_VARIABLES = {
    "TRITON_CACHE_DIR": "/cache/triton",
    "TORCHINDUCTOR_CACHE_DIR": "/cache/torchinductor",
}
# NCCL says why it fails from WARN on only. Ranks meet at a port that asks nobody who they are; all
# are in one pod, so the pod network has no need to reach it.
NCCL_VARIABLES = {"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "=lo"}
# Through /dev/shm NCCL moves what GPUs cannot send each other directly. NVIDIA's guide advises
# 1 GiB; a pod has 64 MiB by default.
SHM_GIBIBYTES_A_GPU = 1
# Of a pod that fetches a model: the client of the hub has pieces of files in memory.
PULL_CPU, PULL_MEMORY = "100m", "2Gi"
UNPULLED = ("shm", "api-keys")


def render_pod_template(service: LLMService, engine_image: str) -> Manifest:
    """The template of the engine's pods; two services with the same spec get the same one."""
    added, lifecycle = service.spec.pod_template, service.spec.lifecycle
    labels = {**added.labels, **common_labels(service.key.name), **queue_labels(service)}
    metadata: Manifest = {"labels": labels}
    if added.annotations:
        metadata["annotations"] = added.annotations
    return {
        "metadata": metadata,
        "spec": {
            "serviceAccountName": engine_name(service.key.name),
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": (
                DRAIN_DELAY_SECONDS + lifecycle.drain_seconds + DRAIN_MARGIN_SECONDS
            ),
            "securityContext": _render_security_context(added.security_context),
            "containers": [_render_container(service, engine_image)],
            "volumes": [*(volume for _, volume in _own_volumes(service)), *added.volumes],
            **_render_placement(service, added),
        },
    }


def render_pull_template(service: LLMService, engine_image: str, args: Sequence[str]) -> Manifest:
    """The template of a pod that only fetches the model: as the engine's, on such a node, but for
    its GPUs, its port, its probes and what they need.
    """
    template = render_pod_template(service, engine_image)
    labels, spec = template["metadata"]["labels"], template["spec"]
    labels.pop(LABEL_QUEUE, None)
    for field in ("resourceClaims", "terminationGracePeriodSeconds"):
        spec.pop(field, None)
    (engine,) = spec["containers"]
    for field in ("ports", "startupProbe", "readinessProbe", "livenessProbe"):
        del engine[field]
    memory = {"memory": PULL_MEMORY}
    resources = {"requests": {"cpu": PULL_CPU, **memory}, "limits": memory}
    engine |= {"name": "preload", "args": list(args), "resources": resources}
    # Keys of the API and the engine's shared memory are not its business.
    engine["volumeMounts"] = [it for it in engine["volumeMounts"] if it["name"] not in UNPULLED]
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] not in UNPULLED]
    return {**template, "spec": {**spec, "restartPolicy": "OnFailure"}}


def queue_labels(service: LLMService) -> dict[str, str]:
    """What the Deployment and its pods have for Kueue, which copies it from one to the other."""
    queue = service.spec.resources.queue_name
    return {} if queue is None else {LABEL_QUEUE: queue}


def _render_security_context(security: SecurityContext) -> Manifest:
    context: Manifest = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if security.user_from == "Image":
        context["runAsUser"] = security.run_as_user or USER_ID
        context["runAsGroup"] = security.run_as_group or USER_ID
    if security.fs_group is not None:
        context["fsGroup"] = security.fs_group
    if security.supplemental_groups:
        context["supplementalGroups"] = list(security.supplemental_groups)
    return context


def _render_placement(service: LLMService, added: PodTemplate) -> Manifest:
    """Where the pods go and who pulls their images; only what the spec has."""
    own_pods = {"labelSelector": {"matchLabels": selector_labels(service.key.name)}}
    placement = {
        "resourceClaims": list(service.spec.resources.gpu.claims),
        "imagePullSecrets": list(added.image_pull_secrets),
        "nodeSelector": added.node_selector,
        "tolerations": list(added.tolerations),
        "affinity": _render_affinity(added.affinity, service.spec.resources.gpu.products),
        "topologySpreadConstraints": [
            {**own_pods, **constraint} for constraint in added.topology_spread_constraints
        ],
        "priorityClassName": added.priority_class_name,
        "runtimeClassName": added.runtime_class_name,
        "schedulerName": added.scheduler_name,
    }
    return {key: value for key, value in placement.items() if value}


def _render_affinity(affinity: Part, products: Sequence[str]) -> Part:
    """The user's affinity, and in each of its terms for nodes one of the products."""
    if not products:
        return affinity
    product = {"key": PRODUCT_LABEL, "operator": "In", "values": list(products)}
    of_nodes = affinity.get("nodeAffinity", {})
    theirs = of_nodes.get(REQUIRED, {}).get("nodeSelectorTerms")
    terms = [
        {**term, "matchExpressions": [*term.get("matchExpressions", []), product]}
        # An empty term matches no node, and has to go on matching none.
        if any(term.values())
        else term
        for term in theirs or []
    ] or [{"matchExpressions": [product]}]
    return {
        **affinity,
        "nodeAffinity": {**of_nodes, REQUIRED: {"nodeSelectorTerms": terms}},
    }


def _render_container(service: LLMService, engine_image: str) -> Manifest:
    mounts = [
        {"name": volume["name"], "mountPath": path}
        # Only what is made for the pod, and its cache, is written to.
        | ({} if "emptyDir" in volume or path == CACHE_PATH else {"readOnly": True})
        for path, volume in _own_volumes(service)
    ]
    container: Manifest = {
        "name": ENGINE,
        "image": service.spec.engine.image or engine_image,
        "args": engine_args(service),
        "env": _render_env(service),
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": _render_resources(service),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "startupProbe": _render_probe(
            "/startup", period=1, failures=service.spec.lifecycle.startup_timeout_seconds
        ),
        "readinessProbe": _render_probe("/ready", period=2, failures=3),
        # Longer than readiness: a busy engine leaves the Service before it is restarted.
        "livenessProbe": _render_probe("/health", period=10, failures=6),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [*mounts, *service.spec.pod_template.volume_mounts],
    }
    if service.spec.pod_template.env_from:
        container["envFrom"] = list(service.spec.pod_template.env_from)
    return container


def _render_env(service: LLMService) -> list[Manifest]:
    env: list[Manifest] = [
        {"name": "HOME", "value": "/cache"},
        {"name": "HF_HOME", "value": "/cache/huggingface"},
        {"name": "PAGODA_CACHE", "value": "/cache/pagoda"},
    ]
    theirs = service.spec.pod_template.env
    names = {variable["name"] for variable in theirs}
    for name, value in _gpu_variables(service.spec.num_gpus).items():
        if name not in names:
            env.append({"name": name, "value": value})
    if (secret := service.spec.model.credentials_secret_ref) is not None:
        for name in CREDENTIALS.get(service.spec.model.uri.partition("://")[0], ()):
            source = {"secretKeyRef": {"name": secret.name, "key": SECRET_KEYS.get(name, name)}}
            env.append({"name": name, "valueFrom": source})
    return [*env, *theirs]


def _gpu_variables(num_gpus: int) -> dict[str, str]:
    """Variables of an engine on GPUs, which the user's own come before."""
    if num_gpus == 0:
        return {}
    return GPU_VARIABLES if num_gpus == 1 else GPU_VARIABLES | NCCL_VARIABLES


def _render_probe(path: str, *, period: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": PORT},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _render_resources(service: LLMService) -> Manifest:
    resources = service.spec.resources
    claims = [{"name": claim["name"]} for claim in resources.gpu.claims]
    both = {
        "ephemeral-storage": resources.ephemeral_storage,
        resources.gpu.resource_name: None if claims else service.spec.num_gpus or None,
    }
    memory_request = resources.memory_request or resources.memory
    return {
        "requests": _quantities({"cpu": resources.cpu, "memory": memory_request, **both}),
        # No cpu by default: idle cores are of use to the tokenizer, and throttling delays steps.
        "limits": _quantities({"cpu": resources.cpu_limit, "memory": resources.memory, **both}),
        **({"claims": claims} if claims else {}),
    }


def _quantities(amounts: Mapping[str, int | float | str | None]) -> dict[str, str]:
    """What the spec says; a number of cores as thousandths, since quantities are decimal."""
    return {
        name: f"{max(1, round(amount * 1000))}m" if isinstance(amount, float) else str(amount)
        for name, amount in amounts.items()
        if amount is not None
    }


def _render_cache(cache: Cache) -> Manifest:
    if cache.pvc is not None:
        return {"persistentVolumeClaim": {"claimName": cache.pvc.claim_name}}
    if cache.host_path is not None:
        # Made by the kubelet it would be root's, and the engine could not write to it.
        return {"hostPath": {"path": cache.host_path.path, "type": "Directory"}}
    return {"emptyDir": {"sizeLimit": str(cache.size_limit)}}


def _own_volumes(service: LLMService) -> list[tuple[str, Manifest]]:
    """(path in the container, volume) of every volume that is not the user's own."""
    num_gpus = service.spec.num_gpus
    # Ranks on a CPU talk over sockets.
    least = f"{SHM_GIBIBYTES_A_GPU * num_gpus}Gi" if num_gpus > 1 else "256Mi"
    shm = {"medium": "Memory", "sizeLimit": str(service.spec.resources.shared_memory or least)}
    volumes: list[tuple[str, Manifest]] = [
        ("/tmp", {"name": "tmp", "emptyDir": {"sizeLimit": TMP_SIZE_LIMIT}}),
        (CACHE_PATH, {"name": "cache", **_render_cache(service.spec.cache)}),
        ("/dev/shm", {"name": "shm", "emptyDir": shm}),
    ]
    if (claim := model_claim(service.spec.model.uri)) is not None:
        source = {"claimName": claim, "readOnly": True}
        volumes.append((MODELS_PATH, {"name": MODELS_VOLUME, "persistentVolumeClaim": source}))
    if (secret := service.spec.auth.api_keys_secret_ref) is not None:
        # The folder, not a file of it: only then does the kubelet bring a changed Secret in.
        keys = {"name": "api-keys", "secret": {"secretName": secret.name}}
        volumes.append((API_KEYS_PATH, keys))
    return volumes
