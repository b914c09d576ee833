"""The manifests of the children."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda_operator.flags import engine_args, model_claim
from pagoda_operator.names import OPTIONAL_KINDS, ChildRef, Manifest
from pagoda_operator.render import render_children, render_deployment, revision_of
from pagoda_operator.spec import DType, KvCacheDtype, Quantization
from pagoda_operator.testing import make_service

CPU = {"gpu": {"count": 0}}
ROLLING = [{"maxSurge": surge, "maxUnavailable": 1 - surge} for surge in (0, 1)]


def deployment(spec: dict[str, Any] | None = None) -> Manifest:
    return render_deployment(make_service(spec), engine_image="engine:1")


def pod_spec(spec: dict[str, Any] | None = None) -> Manifest:
    found: Manifest = deployment(spec)["spec"]["template"]["spec"]
    return found


def container(spec: dict[str, Any] | None = None) -> Manifest:
    found: Manifest = pod_spec(spec)["containers"][0]
    return found


def test_the_children_have_fixed_names_and_one_owner() -> None:
    children = render_children(make_service(), engine_image="engine:1")
    assert list(children) == [
        ChildRef("ServiceAccount", "chat-engine"),
        ChildRef("Service", "chat"),
        ChildRef("Deployment", "chat-engine"),
    ]
    for child in children.values():
        (owner,) = child["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == ("uid-of-chat", True)


@pytest.mark.parametrize(
    ("spec", "bound"),
    [
        ({}, None),
        ({"autoscaling": {"maxReplicas": 1}}, None),
        ({"replicas": 2}, {"maxUnavailable": 1}),
        ({"replicas": 2, "suspend": True}, {"maxUnavailable": 1}),
        ({"autoscaling": {"maxReplicas": 3}}, {"maxUnavailable": 1}),
        ({"disruption": {"minAvailable": "50%"}}, {"minAvailable": "50%"}),
        ({"disruption": {"maxUnavailable": 0}, "replicas": 2}, {"maxUnavailable": 0}),
    ],
)
def test_a_drain_of_nodes_takes_one_of_several_replicas_or_what_the_spec_says(
    spec: dict[str, Any], bound: dict[str, Any] | None
) -> None:
    children = render_children(make_service(spec), engine_image="engine:1")
    budget = children.get(ChildRef("PodDisruptionBudget", "chat-engine"))
    if bound is None:
        assert budget is None
        return
    assert budget is not None
    assert budget["spec"].pop("selector") == deployment()["spec"]["selector"]
    assert budget["spec"] == {**bound, "unhealthyPodEvictionPolicy": "AlwaysAllow"}


def test_what_prometheus_reads_is_made_where_the_cluster_knows_it_and_the_spec_asks() -> None:
    def kinds(served: tuple[str, ...], **observability: Any) -> list[str]:
        service = make_service({"observability": observability})
        children = render_children(service, engine_image="engine:1", served=served)
        return [ref.kind for ref in children][3:]

    assert kinds(()) == []
    assert kinds(OPTIONAL_KINDS) == ["PodMonitor"]
    assert kinds(OPTIONAL_KINDS, monitor="None") == []
    assert kinds(OPTIONAL_KINDS, prometheusRule=True) == ["PodMonitor", "PrometheusRule"]
    assert kinds(("PodMonitor",), prometheusRule=True) == ["PodMonitor"]


def test_the_service_leads_port_80_to_the_pods_of_every_revision() -> None:
    children = render_children(make_service(), engine_image="engine:1")
    service = children[ChildRef("Service", "chat")]["spec"]
    assert [(port["name"], port["port"], port["targetPort"]) for port in service["ports"]] == [
        ("http", 80, 8000)
    ]
    labels = deployment()["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert "pagoda.dev/revision" not in service["selector"]


def test_a_claim_is_mounted_read_only_and_its_folder_is_the_model() -> None:
    spec = {"model": {"uri": "pvc://models/team/gemma/"}}
    assert model_claim("pvc://models/team/gemma/") == "models"
    args = container(spec)["args"]
    assert args[args.index("--model") + 1] == "/models/team/gemma"
    (mount,) = [m for m in container(spec)["volumeMounts"] if m["name"] == "models"]
    assert mount["readOnly"] is True
    (volume,) = [v for v in pod_spec(spec)["volumes"] if v["name"] == "models"]
    assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}


def test_a_model_of_the_hub_is_passed_through_without_a_volume() -> None:
    spec = {"model": {"uri": "hf://org/name"}}
    args = container(spec)["args"]
    assert args[args.index("--model") + 1] == "hf://org/name"
    assert {volume["name"] for volume in pod_spec(spec)["volumes"]} == {"tmp", "cache", "shm"}


def test_the_pod_passes_pod_security_restricted() -> None:
    pod = pod_spec()["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    security = container()["securityContext"]
    assert security == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod_spec()["automountServiceAccountToken"] is False
    kinds = {key for volume in pod_spec()["volumes"] for key in volume if key != "name"}
    assert kinds <= {"emptyDir", "persistentVolumeClaim"}


def test_every_folder_on_the_nodes_disk_is_bounded() -> None:
    def limits(spec: dict[str, Any] | None = None) -> dict[str, str]:
        volumes = pod_spec(spec)["volumes"]
        return {v["name"]: v["emptyDir"].get("sizeLimit") for v in volumes if "emptyDir" in v}

    assert limits() == {"tmp": "4Gi", "cache": "200Gi", "shm": "256Mi"}
    assert limits({"cache": {"sizeLimit": "1Ti"}})["cache"] == "1Ti"
    four = {"engine": {"tensorParallelSize": 4}}
    assert limits(four)["shm"] == "4Gi"
    assert limits({**four, "resources": CPU})["shm"] == "256Mi"
    assert limits({**four, "resources": {"sharedMemory": "9Gi"}})["shm"] == "9Gi"


@pytest.mark.parametrize(
    ("cache", "volume"),
    [
        ({"pvc": {"claimName": "hub"}}, {"persistentVolumeClaim": {"claimName": "hub"}}),
        (
            {"hostPath": {"path": "/var/cache/pagoda"}},
            {"hostPath": {"path": "/var/cache/pagoda", "type": "Directory"}},
        ),
    ],
)
def test_a_cache_that_outlives_the_replica_is_written_to(
    cache: dict[str, Any], volume: dict[str, Any]
) -> None:
    spec = {"cache": cache}
    (found,) = [it for it in pod_spec(spec)["volumes"] if it["name"] == "cache"]
    assert found == {"name": "cache", **volume}
    (mount,) = [it for it in container(spec)["volumeMounts"] if it["name"] == "cache"]
    assert mount == {"name": "cache", "mountPath": "/cache"}


def variables(spec: dict[str, Any] | None = None) -> dict[str, str]:
    env = container(spec)["env"]
    found = {variable["name"]: variable["value"] for variable in env}
    # Server-side apply refuses a name that is there twice.
    assert len(found) == len(env)
    return found


def test_what_an_engine_compiles_and_converts_goes_to_its_cache() -> None:
    own = {"HOME": "/cache", "HF_HOME": "/cache/huggingface", "PAGODA_CACHE": "/cache/pagoda"}
    on_gpus = {
        "TRITON_CACHE_DIR": "/cache/triton",
        "TORCHINDUCTOR_CACHE_DIR": "/cache/torchinductor",
    }
    assert variables({"resources": CPU, "engine": {"tensorParallelSize": 2}}) == own
    assert variables() == own | on_gpus


def test_ranks_on_gpus_meet_within_the_pod_and_say_why_they_do_not() -> None:
    two = {"engine": {"tensorParallelSize": 2}}
    added = {"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "=lo"}
    assert variables(two) == variables() | added


def test_a_variable_for_gpus_that_the_user_sets_is_the_users() -> None:
    theirs = [{"name": name, "value": "x"} for name in ("NCCL_DEBUG", "TRITON_CACHE_DIR")]
    spec = {"engine": {"tensorParallelSize": 2}, "podTemplate": {"env": theirs}}
    assert variables(spec) == variables({"engine": {"tensorParallelSize": 2}}) | {
        "NCCL_DEBUG": "x",
        "TRITON_CACHE_DIR": "x",
    }


@pytest.mark.parametrize(
    ("strategy", "rendered"),
    [
        ("Recreate", {"type": "Recreate"}),
        ("InPlace", {"type": "RollingUpdate", "rollingUpdate": ROLLING[0]}),
        ("Surge", {"type": "RollingUpdate", "rollingUpdate": ROLLING[1]}),
        ("Auto", {"type": "RollingUpdate", "rollingUpdate": ROLLING[1]}),
    ],
)
def test_a_chosen_strategy_holds_on_cpus_and_gpus(strategy: str, rendered: Manifest) -> None:
    for resources in ({}, CPU):
        found = deployment({"resources": resources, "rollout": {"strategy": strategy}})
        assert found["spec"]["strategy"] == rendered


@pytest.mark.parametrize("seconds", [1, 30, 86400])
def test_the_grace_period_covers_the_drain_that_the_flags_ask_for(seconds: int) -> None:
    spec = {"lifecycle": {"drainSeconds": seconds}}
    args = container(spec)["args"]
    drain = [int(args[args.index(f) + 1]) for f in ("--drain-delay-seconds", "--drain-seconds")]
    assert drain == [5, seconds]
    assert pod_spec(spec)["terminationGracePeriodSeconds"] == sum(drain) + 10


def test_a_replica_may_load_for_its_startup_timeout_and_the_rollout_a_little_longer() -> None:
    spec = {"lifecycle": {"startupTimeoutSeconds": 7200}}
    probe = container(spec)["startupProbe"]
    assert (probe["periodSeconds"], probe["failureThreshold"]) == (1, 7200)
    assert deployment(spec)["spec"]["progressDeadlineSeconds"] == 7500
    sooner = {**spec, "rollout": {"progressDeadlineSeconds": 900}}
    assert deployment(sooner)["spec"]["progressDeadlineSeconds"] == 900


def test_a_paused_rollout_is_that_of_the_deployment_and_no_other_pod() -> None:
    found = deployment({"rollout": {"paused": True}})
    assert found["spec"]["paused"] is True
    assert "paused" not in deployment()["spec"]
    assert revision_of(found) == revision_of(deployment())


def test_resources_are_reserved_and_only_cpu_is_not_limited() -> None:
    spec = {
        "engine": {"tensorParallelSize": 2},
        "resources": {"cpu": 4, "memory": "32Gi", "gpu": {"resourceName": "amd.com/gpu"}},
    }
    assert container(spec)["resources"] == {
        "requests": {"cpu": "4", "memory": "32Gi", "amd.com/gpu": "2"},
        "limits": {"memory": "32Gi", "amd.com/gpu": "2"},
    }
    assert container({"resources": CPU})["resources"] == {"requests": {}, "limits": {}}


def test_limits_and_requests_can_differ_where_a_namespace_asks_for_both() -> None:
    resources = {
        **CPU,
        "cpu": 0.5,
        "cpuLimit": "1500m",
        "memory": "8Gi",
        "memoryRequest": "6Gi",
        "ephemeralStorage": "20Gi",
    }
    assert container({"resources": resources})["resources"] == {
        "requests": {"cpu": "500m", "memory": "6Gi", "ephemeral-storage": "20Gi"},
        "limits": {"cpu": "1500m", "memory": "8Gi", "ephemeral-storage": "20Gi"},
    }


def test_the_image_of_the_spec_comes_before_the_one_of_the_operator() -> None:
    assert container()["image"] == "engine:1"
    assert container({"engine": {"image": "mine:2"}})["image"] == "mine:2"


def test_auto_leaves_its_flag_out() -> None:
    args = engine_args(make_service())
    assert not {"--dtype", "--quantization", "--kv-cache-dtype", "--max-model-len"} & set(args)


def test_extra_arguments_come_last_and_as_they_are() -> None:
    args = engine_args(make_service({"engine": {"extraArgs": ["--seed", "7"]}}))
    assert args[-2:] == ["--seed", "7"]


def test_only_a_changed_pod_makes_a_new_revision() -> None:
    first = deployment()
    assert revision_of(first) == revision_of(deployment({"replicas": 7}))
    assert revision_of(first) != revision_of(deployment({"engine": {"maxNumSeqs": 8}}))
    assert (
        first["spec"]["selector"] == deployment({"engine": {"maxNumSeqs": 8}})["spec"]["selector"]
    )


engines = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(get_args(DType)),
        "quantization": st.sampled_from(get_args(Quantization)),
        "kvCacheDtype": st.sampled_from(get_args(KvCacheDtype)),
        "maxModelLen": st.integers(2, 10**6),
        "tensorParallelSize": st.sampled_from([1, 2, 4, 8]),
        "prefixCaching": st.booleans(),
        "maxNumBatchedTokens": st.integers(1, 2**20),
        "blockSize": st.sampled_from([8, 16, 32, 64, 128, 256]),
    },
)


@given(first=engines, second=engines)
def test_there_and_back_again_renders_the_same_bytes(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    def render(engine: dict[str, Any]) -> str:
        service = make_service({"engine": engine})
        return json.dumps(list(render_children(service, engine_image="engine:1").values()))

    before = render(first)
    render(second)
    assert render(first) == before


@given(engine=engines)
def test_every_field_of_the_engine_shows_in_the_pod(engine: dict[str, Any]) -> None:
    """A field that was accepted and ignored would leave the revision as it was."""
    plain = make_service().spec.engine
    changed = make_service({"engine": engine}).spec.engine
    is_same = revision_of(deployment({"engine": engine})) == revision_of(deployment())
    assert is_same == (plain == changed)
