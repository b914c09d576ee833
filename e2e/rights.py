"""What the chart lets an operator do: accounts that may do just that, and what was done with it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import stack
from api import Api
from audit import Request
from charts import render
from kube import Kubectl

ACCOUNT = "pagoda-operator"
Right = tuple[str, str, str]
"""(group, resource or resource/subresource, verb)"""


def kubeconfig_of_chart(kubectl: Kubectl, folder: Path, *, is_cluster_wide: bool = False) -> str:
    """A kubeconfig with the rights that the chart gives an operator of a namespace, or of all."""
    api, namespace = Api.of(kubectl), kubectl.namespace
    home = {"name": ACCOUNT, "namespace": namespace}
    name = f"{ACCOUNT}.{namespace}" if is_cluster_wide else ACCOUNT
    kind = "ClusterRole" if is_cluster_wide else "Role"
    owner = kubectl.json("get", "namespace", namespace)["metadata"]["uid"]
    reference = {"apiVersion": "v1", "kind": "Namespace", "name": namespace, "uid": owner}
    # What is of the cluster goes with the namespace all the same.
    metadata = {"name": name, "ownerReferences": [reference]} if is_cluster_wide else home
    group = "rbac.authorization.k8s.io"
    role: dict[str, Any] = {"apiVersion": f"{group}/v1", "kind": kind, "metadata": metadata}
    objects = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": home},
        {**role, "rules": chart_rules(is_cluster_wide)},
        {
            **role,
            "kind": f"{kind}Binding",
            "roleRef": {"apiGroup": group, "kind": kind, "name": name},
            "subjects": [{"kind": "ServiceAccount", **home}],
        },
    ]
    for item in objects:
        api.create_if_missing(item)
    config = kubectl.json("config", "view", "--raw", "--minify")
    token = api.create_token(namespace, ACCOUNT)
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
    path = folder / f"kubeconfig-{name}"
    path.write_text(json.dumps(config))
    return str(path)


@cache
def chart_rules(is_cluster_wide: bool) -> list[dict[str, Any]]:
    """The rules of the role that the chart makes."""
    value = "" if is_cluster_wide else "team"
    documents = render(stack.Target.from_environment(), f'watchNamespace="{value}"')
    (role,) = (item for item in documents if item["kind"] in ("Role", "ClusterRole"))
    found: list[dict[str, Any]] = role["rules"]
    return found


def granted(rules: Iterable[dict[str, Any]]) -> set[Right]:
    """Each thing that the rules allow."""
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def used(requests: Iterable[Request]) -> set[Right]:
    """What requests made use of."""
    found: set[Right] = set()
    for request in requests:
        resource = "/".join(filter(None, (request.resource, request.subresource)))
        found.add((request.group, resource, request.verb))
        if request.verb == "patch" and request.status == 201:
            # An apply that makes the object has to be allowed both.
            found.add((request.group, resource, "create"))
    return found
