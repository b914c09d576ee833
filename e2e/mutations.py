"""What platforms change in objects on their way into the API server, by admission policies."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from kube import Kubectl, wait_until

SIDECAR = 'containers: [Object.spec{path}.containers{{name: "proxy", image: "proxy:1"}}]'
# Name → (kinds, what is merged into them, or a list of patches, in CEL).
MUTATIONS: dict[str, tuple[list[str], str]] = {
    "a sidecar in pods": (["pods"], f"spec: Object.spec{{{SIDECAR.format(path='')}}}"),
    "a sidecar in the template": (
        ["deployments"],
        "spec: Object.spec{template: Object.spec.template{spec: Object.spec.template.spec{"
        f"{SIDECAR.format(path='.template.spec')}}}}}}}",
    ),
    "a toleration as default": (
        ["deployments"],
        '[JSONPatch{op: "add", path: "/spec/template/spec/tolerations", value: '
        '[{"key": "team", "operator": "Exists"}]}]',
    ),
    "labels and annotations": (
        ["deployments", "services", "serviceaccounts"],
        'metadata: Object.metadata{labels: {"team.dev/bill": "a"}, '
        'annotations: {"team.dev/checked": "yes"}}',
    ),
    "Kueue's gate": (
        ["pods"],
        "spec: Object.spec{schedulingGates: [Object.spec.schedulingGates{"
        'name: "kueue.x-k8s.io/admission"}]}, '
        'metadata: Object.metadata{labels: {"kueue.x-k8s.io/managed": "true"}}',
    ),
}
GROUPS = {"deployments": "apps"}


@contextlib.contextmanager
def mutating(kubectl: Kubectl, services: dict[str, str]) -> Iterator[None]:
    """Change what belongs to services of the namespace: name of the service → of the mutation."""
    api, kind = "admissionregistration.k8s.io/v1", "MutatingAdmissionPolicy"
    names = {name: f"{kubectl.namespace}-{name}" for name in services}
    for name, mutation in services.items():
        kinds, merged = MUTATIONS[mutation]
        rules = [
            {
                "apiGroups": [GROUPS.get(resource, "")],
                "apiVersions": ["v1"],
                "operations": ["CREATE", "UPDATE"],
                "resources": [resource],
            }
            for resource in kinds
        ]
        policy = {
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "matchConstraints": {
                "resourceRules": rules,
                "namespaceSelector": {
                    "matchLabels": {"kubernetes.io/metadata.name": kubectl.namespace}
                },
                "objectSelector": {"matchLabels": {"pagoda.dev/service": name}},
            },
            "mutations": [_mutation(merged)],
        }
        for item, spec in ((kind, policy), (f"{kind}Binding", {"policyName": names[name]})):
            metadata = {"name": names[name]}
            kubectl.apply({"apiVersion": api, "kind": item, "metadata": metadata, "spec": spec})
    try:
        for name, mutation in services.items():
            wait_until(
                f"{mutation} in force",
                lambda name=name: _is_in_force(kubectl, name),
            )
        yield
    finally:
        for item in (f"{kind}Binding", kind):
            kubectl.run("delete", item.lower(), *names.values(), "--ignore-not-found")


def _mutation(merged: str) -> dict[str, Any]:
    if merged.startswith("["):
        return {"patchType": "JSONPatch", "jsonPatch": {"expression": merged}}
    configuration = {"expression": f"Object{{{merged}}}"}
    return {"patchType": "ApplyConfiguration", "applyConfiguration": configuration}


def _is_in_force(kubectl: Kubectl, name: str) -> bool:
    """Whether each of the kinds comes out of the API server otherwise than it went in."""
    labels = {"pagoda.dev/service": name}
    metadata = {"name": f"{name}-probe", "labels": labels}
    pod = {"containers": [{"name": "a", "image": "a:1"}]}
    template = {"metadata": {"labels": labels}, "spec": pod}
    probes = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {"selector": {"matchLabels": labels}, "template": template},
        },
    ]
    marks = ("proxy:1", '"key": "team"', "team.dev/bill", "kueue.x-k8s.io/admission")
    flags = ("--dry-run=server", "-o", "json", "-f", "-")
    texts = [kubectl.run("create", *flags, stdin=json.dumps(probe)) for probe in probes]
    return any(mark in text for mark in marks for text in texts)
