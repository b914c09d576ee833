"""The API server, asked by one client: for many requests, each of which a kubectl is slow for."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from kube import Kubectl
from kubernetes import client, config

Manifest = dict[str, Any]


class Refusal(Exception):
    """What the API server says against a request."""


class AlreadyThere(Refusal):
    """There is an object of that name."""


@dataclass(frozen=True, slots=True)
class Api:
    """Creates objects, or tries whether it could."""

    client: client.ApiClient

    @staticmethod
    def of(kubectl: Kubectl) -> Api:
        return Api(config.new_client_from_config(kubectl.kubeconfig, context=kubectl.context))

    def create(self, manifest: Manifest, *, is_dry_run: bool = False) -> Manifest:
        """The object as it is then, or would be. Raises Refusal, also for unknown fields."""
        query = [("fieldValidation", "Strict"), *([("dryRun", "All")] if is_dry_run else [])]
        return self._post(_path(manifest), query, manifest)

    def create_if_missing(self, manifest: Manifest) -> None:
        """Raises Refusal."""
        with contextlib.suppress(AlreadyThere):
            self.create(manifest)

    def create_token(self, namespace: str, account: str) -> str:
        """A token of a service account."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        return str(self._post(path, [], body)["status"]["token"])

    def _post(self, path: str, query: list[tuple[str, str]], body: Manifest) -> Manifest:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = self.client.param_serialize(
            "POST",
            path,
            query_params=query,
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        response = self.client.call_api(*request)
        answer: Manifest = json.loads(response.read())
        if response.status >= 300:
            raise (AlreadyThere if response.status == 409 else Refusal)(answer["message"])
        return answer


def _path(manifest: Manifest) -> str:
    version, kind, metadata = manifest["apiVersion"], manifest["kind"], manifest["metadata"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    plural = f"{kind.lower()}s".replace("ys", "ies")
    is_of_cluster = kind.startswith("Cluster")
    within = "" if is_of_cluster else f"/namespaces/{metadata.get('namespace', 'default')}"
    return f"{root}{within}/{plural}"
