"""The API server for the bench itself, past the proxy: what users and kubelets ask."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp

Manifest = dict[str, Any]
MERGE = "application/merge-patch+json"
RESOURCES = {
    "LLMService": ("/apis/pagoda.dev/v1alpha1", "llmservices"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "Service": ("/api/v1", "services"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Job": ("/apis/batch/v1", "jobs"),
    "Pod": ("/api/v1", "pods"),
    "Role": ("/apis/rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "rolebindings"),
}
WATCHED = ("LLMService", "Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "Pod")


class ApiRefused(Exception):
    """The API server did not do what the bench asked for."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """Requests with the rights of an administrator."""

    def __init__(self, kubeconfig: Path) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        self.server: str = cluster["server"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        user = config["users"][0]["user"]
        self.trust = ssl.create_default_context(cadata=authority)
        own = ssl.create_default_context(cadata=authority)
        with tempfile.NamedTemporaryFile() as pair:
            pair.write(base64.b64decode(user["client-certificate-data"]))
            pair.write(base64.b64decode(user["client-key-data"]))
            pair.flush()
            own.load_cert_chain(pair.name)
        connector = aiohttp.TCPConnector(ssl=own, limit=0)
        self._session = aiohttp.ClientSession(self.server, connector=connector)

    async def close(self) -> None:
        await self._session.close()

    async def request(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> Manifest:
        """Raises: ApiRefused."""
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": content_type}
        async with self._session.request(method, path, data=data, headers=headers) as response:
            answer: Manifest = await response.json(content_type=None)
            if response.status >= 300:
                words = answer.get("message", "")
                raise ApiRefused(response.status, f"{method} {path}: {words}")
            return answer

    async def create(self, manifest: Manifest, *, may_exist: bool = False) -> None:
        metadata = manifest["metadata"]
        path = path_of(manifest["kind"], metadata.get("namespace"))
        try:
            await self.request("POST", path, manifest)
        except ApiRefused as refused:
            if not may_exist or refused.status != 409:
                raise

    async def patch(
        self, kind: str, namespace: str, name: str, patch: Manifest, subresource: str = ""
    ) -> None:
        """A merge patch."""
        await self.request("PATCH", path_of(kind, namespace, name) + subresource, patch, MERGE)

    async def delete(self, kind: str, namespace: str, name: str, **options: Any) -> None:
        """Delete in the background; it is no error if there is nothing of the name."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", **options}
        with contextlib.suppress(ApiRefused):
            await self.request("DELETE", path_of(kind, namespace, name), body)

    async def wait_served(self, kind: str) -> None:
        """Until the API server has made something of a new CRD."""
        while True:
            async with self._session.get(path_of(kind)) as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.2)

    async def watch(self, kind: str, on_event: Callable[[str, Manifest], None]) -> None:
        """Tell of all objects of a kind, for ever; a gap is made up for by a list."""
        while True:
            # A server that is short of time is asked again: what was missed is in the next list.
            with contextlib.suppress(ApiRefused, aiohttp.ClientError, TimeoutError):
                listed = await self.request("GET", path_of(kind))
                on_event("LISTED", listed)
                version = listed["metadata"]["resourceVersion"]
                query = f"?watch=true&allowWatchBookmarks=true&resourceVersion={version}"
                async with contextlib.aclosing(self._events(path_of(kind) + query)) as events:
                    async for event in events:
                        if event["type"] == "ERROR":
                            break
                        if event["type"] != "BOOKMARK":
                            on_event(event["type"], event["object"])
            await asyncio.sleep(0.1)

    async def _events(self, path: str) -> AsyncGenerator[Manifest, None]:
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._session.get(path, timeout=timeout) as response:
            async for line in whole_lines(response.content):
                yield json.loads(line)


async def whole_lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length: aiohttp's own are limited."""
    rest = b""
    async for chunk in stream.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line:
                yield line


def path_of(kind: str, namespace: str | None = None, name: str = "") -> str:
    if kind in ("Namespace", "Node", "CustomResourceDefinition"):
        return "/".join(filter(None, [_CLUSTER_WIDE[kind], name]))
    prefix, plural = RESOURCES[kind]
    parts = [prefix, *(["namespaces", namespace] if namespace else []), plural]
    return "/".join([*parts, *([name] if name else [])])


_CLUSTER_WIDE = {
    "Namespace": "/api/v1/namespaces",
    "Node": "/api/v1/nodes",
    "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
}
