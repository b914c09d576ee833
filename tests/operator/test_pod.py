"""What the user adds to the pods of the engines, and what stays the operator's."""

from __future__ import annotations

from typing import Any

import pytest

from pagoda_operator.names import ChildRef, Manifest, common_labels, selector_labels
from pagoda_operator.render import (
    render_children,
    render_deployment,
    render_network_policy,
    revision_of,
)
from pagoda_operator.testing import KEY, make_service

# Every field of spec.podTemplate, and where of the pod it ends up as it is.
PLACEMENT: dict[str, Any] = {
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "schedulerName": "volcano",
}


def deployment(spec: dict[str, Any] | None = None) -> Manifest:
    return render_deployment(make_service(spec), engine_image="engine:1")


def template(spec: dict[str, Any] | None = None) -> Manifest:
    found: Manifest = deployment(spec)["spec"]["template"]
    return found


def pod(spec: dict[str, Any] | None = None) -> Manifest:
    found: Manifest = template(spec)["spec"]
    return found


def added(**fields: Any) -> dict[str, Any]:
    return {"podTemplate": fields}


@pytest.mark.parametrize("field", PLACEMENT)
def test_a_field_of_the_placement_reaches_the_pod_and_makes_a_new_revision(field: str) -> None:
    spec = added(**{field: PLACEMENT[field]})
    assert pod(spec)[field] == PLACEMENT[field]
    assert field not in pod()
    assert revision_of(deployment(spec)) != revision_of(deployment())


def test_gpus_come_by_claims_in_place_of_a_resource() -> None:
    claims = [{"name": "gpu", "resourceClaimTemplateName": "two-gpus"}]
    spec = {"engine": {"tensorParallelSize": 2}, "resources": {"gpu": {"claims": claims}}}
    (container,) = pod(spec)["containers"]
    assert pod(spec)["resourceClaims"] == claims
    assert container["resources"] == {"requests": {}, "limits": {}, "claims": [{"name": "gpu"}]}
    assert container["args"][container["args"].index("--device") + 1] == "cuda"


def test_a_queue_of_kueue_is_named_by_the_deployment_and_its_pods() -> None:
    spec = {"resources": {"queueName": "team"}}
    label = {"kueue.x-k8s.io/queue-name": "team"}
    for metadata in (deployment(spec)["metadata"], template(spec)["metadata"]):
        assert label.items() <= metadata["labels"].items()
    assert label.keys().isdisjoint(deployment()["metadata"]["labels"])
    assert label.keys().isdisjoint(deployment(spec)["spec"]["selector"]["matchLabels"])


PRODUCTS = ["NVIDIA-H100-80GB-HBM3", "NVIDIA-H200"]


def required_terms(node_affinity: dict[str, Any], products: list[str]) -> list[Manifest]:
    """The terms of which a node has to match one."""
    spec = {
        "resources": {"gpu": {"products": products}},
        **added(affinity={"nodeAffinity": node_affinity, "podAntiAffinity": {"a": 1}}),
    }
    affinity = pod(spec)["affinity"]
    assert affinity["podAntiAffinity"] == {"a": 1}
    preferred = "preferredDuringSchedulingIgnoredDuringExecution"
    assert affinity["nodeAffinity"].get(preferred) == node_affinity.get(preferred)
    required: Manifest = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return list(required["nodeSelectorTerms"])


def test_a_node_has_one_of_the_products_and_what_the_affinity_asks_for_as_well() -> None:
    product = {"key": "nvidia.com/gpu.product", "operator": "In", "values": PRODUCTS}
    alone = pod({"resources": {"gpu": {"products": PRODUCTS}}})["affinity"]
    assert alone == {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [product]}]
            }
        }
    }
    preferred = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1}]}
    assert required_terms(preferred, PRODUCTS) == [{"matchExpressions": [product]}]
    zone = {"key": "zone", "operator": "In", "values": ["a"]}
    # One of the terms is enough for a node, so each has the product; none matches by an empty one.
    terms = [{"matchExpressions": [zone]}, {"matchFields": [zone]}, {}, {"matchExpressions": []}]
    theirs = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    assert required_terms(theirs | preferred, PRODUCTS) == [
        {"matchExpressions": [zone, product]},
        {"matchFields": [zone], "matchExpressions": [product]},
        {},
        {"matchExpressions": []},
    ]
    assert required_terms(theirs, []) == terms
    assert "affinity" not in pod({"resources": {"gpu": {"products": []}}})


def test_labels_and_annotations_come_beside_those_of_the_operator() -> None:
    spec = added(labels={"team": "a", "pagoda.dev/service": "b"}, annotations={"scrape": "true"})
    metadata = template(spec)["metadata"]
    assert metadata["labels"]["team"] == "a"
    assert common_labels("chat").items() <= metadata["labels"].items()
    assert metadata["annotations"] == {"scrape": "true"}
    assert "annotations" not in template()["metadata"]


def test_a_spread_counts_the_pods_of_the_service_unless_it_says_which() -> None:
    constraint = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
    theirs = {**constraint, "labelSelector": {"matchLabels": {"a": "b"}}}
    first, second = pod(added(topologySpreadConstraints=[constraint, theirs]))[
        "topologySpreadConstraints"
    ]
    assert first["labelSelector"] == {"matchLabels": selector_labels("chat")}
    assert second == theirs


def test_variables_volumes_and_mounts_come_after_those_of_the_operator() -> None:
    volume = {"name": "ca", "configMap": {"name": "corporate-ca"}}
    mount = {"name": "ca", "mountPath": "/etc/ssl/corporate", "readOnly": True}
    variable, source = {"name": "HF_ENDPOINT", "value": "https://hub"}, {"secretRef": {"name": "s"}}
    spec = added(env=[variable], envFrom=[source], volumes=[volume], volumeMounts=[mount])
    (container,) = pod(spec)["containers"]
    assert container["env"] == [*pod()["containers"][0]["env"], variable]
    assert container["envFrom"] == [source]
    assert container["volumeMounts"] == [*pod()["containers"][0]["volumeMounts"], mount]
    assert pod(spec)["volumes"] == [*pod()["volumes"], volume]


@pytest.mark.parametrize(
    ("uri", "keys"),
    [
        ("hf://org/gated", ["HF_TOKEN"]),
        ("https://example.com/llama", ["PAGODA_MODEL_TOKEN"]),
        ("s3://models/llama", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]),
        ("gs://models/llama", ["GS_ACCESS_KEY_ID", "GS_SECRET_ACCESS_KEY"]),
    ],
)
def test_credentials_come_from_the_secret_and_stand_nowhere(uri: str, keys: list[str]) -> None:
    (container,) = pod({"model": {"uri": uri, "credentialsSecretRef": {"name": "hub"}}})[
        "containers"
    ]
    assert [it for it in container["env"] if "valueFrom" in it] == [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": "hub", "key": key}}} for key in keys
    ]


def test_a_registry_is_asked_with_the_secret_that_kubectl_makes_for_it() -> None:
    model = {"uri": "oci://ghcr.io/team/llama:v1", "credentialsSecretRef": {"name": "ghcr"}}
    (container,) = pod({"model": model})["containers"]
    source = {"secretKeyRef": {"name": "ghcr", "key": ".dockerconfigjson"}}
    assert {"name": "DOCKER_AUTH_CONFIG", "valueFrom": source} in container["env"]


def test_a_revision_of_the_hub_is_told_to_the_engine() -> None:
    (container,) = pod({"model": {"uri": "hf://org/name", "revision": "v1.0"}})["containers"]
    assert container["args"][container["args"].index("--revision") + 1] == "v1.0"


def test_api_keys_are_a_folder_that_the_kubelet_renews() -> None:
    spec = {"auth": {"apiKeysSecretRef": {"name": "keys"}}}
    (container,) = pod(spec)["containers"]
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "api-keys"]
    # With a subPath the kubelet would never bring a changed Secret in.
    assert mount == {"name": "api-keys", "mountPath": "/etc/pagoda/api-keys", "readOnly": True}
    assert pod(spec)["volumes"][-1] == {"name": "api-keys", "secret": {"secretName": "keys"}}
    assert container["args"][container["args"].index("--api-key-file") + 1] == mount["mountPath"]


def test_the_platform_may_give_the_user_and_the_rest_stays_restricted() -> None:
    security = pod(added(securityContext={"userFrom": "Platform"}))["securityContext"]
    assert security == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_a_user_of_the_spec_comes_before_the_one_of_the_image() -> None:
    assert (pod()["securityContext"]["runAsUser"], pod()["securityContext"]["runAsGroup"]) == (
        65532,
        65532,
    )
    ours = {"runAsUser": 1000, "fsGroup": 2000, "supplementalGroups": [3000]}
    security = pod(added(securityContext=ours))["securityContext"]
    assert ours.items() <= security.items()
    assert (security["runAsGroup"], security["runAsNonRoot"]) == (65532, True)


def test_a_network_policy_lets_in_the_peers_and_the_operator_and_nobody_else() -> None:
    ref = ChildRef("NetworkPolicy", f"{KEY.name}-engine")
    assert ref not in render_children(make_service(), engine_image="engine:1")

    def peers(**fields: Any) -> list[Manifest]:
        service = make_service({"networkPolicy": {"enabled": True, **fields}})
        spec = render_children(service, engine_image="engine:1")[ref]["spec"]
        assert spec["podSelector"] == {"matchLabels": selector_labels(KEY.name)}
        (rule,) = spec["ingress"]
        assert rule["ports"] == [{"port": 8000, "protocol": "TCP"}]
        return list(rule["from"])

    operator = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "pagoda-operator"}},
    }
    assert peers() == [{"podSelector": {}}, operator]
    gateway = {"namespaceSelector": {"matchLabels": {"gateway": "true"}}}
    assert peers(**{"from": [gateway]}) == [gateway, operator]


def test_no_pod_of_another_namespace_passes_for_the_operator() -> None:
    policy = render_network_policy(make_service(), "pagoda-system")
    (*_, operator) = policy["spec"]["ingress"][0]["from"]
    assert operator["namespaceSelector"] == {
        "matchLabels": {"kubernetes.io/metadata.name": "pagoda-system"}
    }
