"""What a pod may have beside what the operator gives it: taken, or refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
from api import Api, Refusal
from kube import Kubectl, wait_until
from llmservices import manifest
from operator_process import OperatorProcess

pytestmark = pytest.mark.cluster

MOUNT = {"volumes": [{"name": "a", "configMap": {"name": "a"}}]}
BAD_PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "a container": ({"containers": []}, 'unknown field "spec.podTemplate.containers"'),
    "a label of the operator": (
        {"labels": {"app.kubernetes.io/name": "x"}},
        "podTemplate.labels has a label that the operator sets itself",
    ),
    "a label of the domain": (
        {"labels": {"pagoda.dev/revision": "x"}},
        "podTemplate.labels has a label that the operator sets itself",
    ),
    "an unconfined container": (
        {"annotations": {"container.apparmor.security.beta.kubernetes.io/engine": "unconfined"}},
        "podTemplate.annotations may not loosen the security of the pods",
    ),
    "a queue as a label": (
        {"labels": {"kueue.x-k8s.io/queue-name": "team"}},
        "set spec.resources.queueName",
    ),
    "a label with a space": ({"labels": {"team": "a b"}}, "a label is NAME or DOMAIN/NAME"),
    "a variable of the operator": (
        {"env": [{"name": "HF_HOME", "value": "/x"}]},
        "podTemplate.env has a variable that the operator sets itself: HF_HOME",
    ),
    "a token for all to read": (
        {"env": [{"name": "HF_TOKEN", "value": "hf_x"}]},
        "set spec.model.credentialsSecretRef",
    ),
    "API keys in a variable": (
        {"env": [{"name": "PAGODA_API_KEY", "value": "x"}]},
        "set spec.auth.apiKeysSecretRef",
    ),
    "a variable twice": (
        {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]},
        "Duplicate value",
    ),
    "a variable of two sources": (
        {
            "env": [
                {
                    "name": "A",
                    "value": "1",
                    "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}},
                }
            ]
        },
        "a variable has a value or a valueFrom, not both",
    ),
    "variables from nowhere": ({"envFrom": [{"prefix": "A_"}]}, "a configMapRef or a secretRef"),
    "a volume of the operator": (
        {"volumes": [{"name": "cache", "configMap": {"name": "a"}}]},
        "podTemplate.volumes has a name that the operator uses itself: cache",
    ),
    "a folder of the node": (
        {"volumes": [{"name": "a", "hostPath": {"path": "/"}}]},
        'unknown field "spec.podTemplate.volumes[0].hostPath"',
    ),
    "a volume of nothing": (
        {"volumes": [{"name": "a"}]},
        "a volume is one of configMap, secret, persistentVolumeClaim and emptyDir",
    ),
    "an unbounded folder": (
        {"volumes": [{"name": "a", "emptyDir": {}}]},
        "spec.podTemplate.volumes[0].emptyDir.sizeLimit: Required value",
    ),
    "a mount of no volume": (
        {"volumeMounts": [{"name": "b", "mountPath": "/b"}]},
        "podTemplate.volumeMounts names a volume that podTemplate.volumes does not have",
    ),
    **{
        f"a mount at {path}": (
            {**MOUNT, "volumeMounts": [{"name": "a", "mountPath": path}]},
            f"podTemplate.volumeMounts has a path that belongs to the engine itself: {path}",
        )
        for path in ("/cache", "/tmp/", "/models/x", "/dev/shm", "/etc/pagoda/api-keys", "/opt")
    },
    **{
        f"a mount at {path or 'nothing'}": (
            {**MOUNT, "volumeMounts": [{"name": "a", "mountPath": path}]},
            "mountPath is an absolute path below /",
        )
        for path in ("", "/", "a", "/a/../cache", "//cache", "/./cache")
    },
    "a taint's effect with a typo": (
        {"tolerations": [{"operator": "Exists", "effect": "NoSchedul"}]},
        'Unsupported value: "NoSchedul"',
    ),
    "a term of an affinity with a typo": (
        {"affinity": {"nodeAffinity": {"required": {}}}},
        'unknown field "spec.podTemplate.affinity.nodeAffinity.required"',
    ),
    "a user of the spec and of the platform": (
        {"securityContext": {"userFrom": "Platform", "runAsUser": 1000}},
        "userFrom: Platform leaves the user to the platform; remove runAsUser and runAsGroup",
    ),
    "root": ({"securityContext": {"runAsUser": 0}}, "greater than or equal to 1"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_a_bad_pod_template_is_refused_in_words_that_help(api: Api, case: str) -> None:
    part, words = BAD_PARTS[case]
    with pytest.raises(Refusal) as refusal:
        api.create(manifest({"podTemplate": part}), is_dry_run=True)
    assert words in str(refusal.value)


EVERYTHING_OF_A_POD: dict[str, Any] = {
    "labels": {"team": "a", "example.com/cost-center": ""},
    "annotations": {"prometheus.io/scrape": "true"},
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"cloud.example.com/pool": "gpu"},
    "tolerations": [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "a", "value": "b", "effect": "NoExecute", "tolerationSeconds": 30},
    ],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h100"]}]}
                ]
            }
        },
        "podAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 50,
                    "podAffinityTerm": {
                        "topologyKey": "kubernetes.io/hostname",
                        "labelSelector": {"matchLabels": {"team": "a"}},
                    },
                }
            ]
        },
    },
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "runtimeClassName": "nvidia",
    "schedulerName": "default-scheduler",
    "env": [
        {"name": "HF_ENDPOINT", "value": "https://hub.example.com"},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}},
    ],
    "envFrom": [{"prefix": "A_", "configMapRef": {"name": "a", "optional": True}}],
    "volumes": [
        {"name": "ca", "configMap": {"name": "a", "items": [{"key": "k", "path": "ca.crt"}]}},
        {"name": "key", "secret": {"secretName": "a", "defaultMode": 0o440}},
        {"name": "more", "persistentVolumeClaim": {"claimName": "a", "readOnly": True}},
        {"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    ],
    "volumeMounts": [
        {"name": "ca", "mountPath": "/etc/ssl/ca.crt", "subPath": "ca.crt", "readOnly": True},
        {"name": "more", "mountPath": "/cache/huggingface"},
    ],
    "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000},
}


def test_a_pod_gets_all_that_its_template_may_have(
    namespace: Kubectl, operator: OperatorProcess
) -> None:
    """It is in the Deployment; a policy that is turned off goes, and no pod restarts for it."""
    spec = {
        "model": {
            "uri": "hf://org/gated",
            "revision": "v1.0",
            "credentialsSecretRef": {"name": "hub"},
        },
        "resources": {
            "cpu": 0.5,
            "cpuLimit": 1.5,
            "memory": "4Gi",
            "memoryRequest": 2**31,
            "ephemeralStorage": "20Gi",
        },
        "auth": {"apiKeysSecretRef": {"name": "keys"}},
        "cache": {"sizeLimit": "15Gi"},
        "networkPolicy": {"enabled": True, "from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]},
        "podTemplate": EVERYTHING_OF_A_POD,
    }
    namespace.apply(manifest(spec, name="chat"))
    found = wait_until(
        "the Deployment",
        lambda: namespace.get("deployment", "chat-engine"),
        on_timeout=lambda: operator.log,
    )
    template = found["spec"]["template"]
    assert EVERYTHING_OF_A_POD["labels"].items() <= template["metadata"]["labels"].items()
    pod, (container,) = template["spec"], template["spec"]["containers"]
    assert container["resources"]["requests"]["cpu"] == "500m"
    assert container["resources"]["limits"]["cpu"] == "1500m"
    for field in ("tolerations", "affinity", "nodeSelector", "imagePullSecrets"):
        assert pod[field] == EVERYTHING_OF_A_POD[field]
    policy = namespace.json("get", "networkpolicy", "chat-engine")
    assert policy["spec"]["podSelector"] == found["spec"]["selector"]
    generation = found["metadata"]["generation"]
    namespace.run("patch", "llmservice", "chat", "--type=merge", "-p", TURN_OFF_POLICY)
    wait_until(
        "no policy",
        lambda: namespace.get("networkpolicy", "chat-engine") is None,
        on_timeout=lambda: operator.log,
    )
    after = namespace.json("get", "deployment", "chat-engine")["metadata"]["generation"]
    assert after == generation


TURN_OFF_POLICY = '{"spec": {"networkPolicy": {"enabled": false}}}'
