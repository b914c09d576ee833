"""The API server, on plain dicts. The only module that talks to it, beside kopf's watches.

Uses the `kubernetes` package for credentials and transport, not its typed models: those drop the
fields that they do not know, and importing them costs more than the operator.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import urllib.request
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.config_exception import ConfigException

from pagoda_operator.names import RESOURCES, Manifest, api_version
from pagoda_operator.telemetry import Telemetry

REQUEST_TIMEOUT_SECONDS = 15.0
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ApiError(Exception):
    """The API server refused a request; the message is its own."""

    retry_after_seconds = 0.0
    """What the server asked to wait."""


class NotFound(ApiError):
    """404: there is no such object."""


class Conflict(ApiError):
    """409: the object is not the one, or not in the state, that the request was made for."""


class Refused(ApiError):
    """400, 403, 413 or 422: the same request will be refused again until something changes."""


class Unavailable(ApiError):
    """429, 5xx or no answer: the same request may succeed later."""

    def __init__(self, message: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class StartError(Exception):
    """The operator cannot start; the message says why and what helps."""


class ApiServer:
    """Requests to the API server; every method but `connect` and `close` raises ApiError."""

    def __init__(self, client: Any, telemetry: Telemetry) -> None:
        self._client = client
        self._telemetry = telemetry

    @classmethod
    async def connect(cls, telemetry: Telemetry, context: str | None = None) -> ApiServer:
        """Take the credentials of the pod or of the kubeconfig; sends no request.

        Args:
            context: of the kubeconfig; None: the current one.
        Raises:
            StartError: there are none.
        """
        configuration = Configuration()
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(configuration)
            else:
                await config.load_kube_config(context=context, client_configuration=configuration)
        except (ConfigException, OSError, ValueError) as error:
            raise StartError(
                f"no access to a Kubernetes API server: {error}. "
                "Run the operator in a pod, or set KUBECONFIG."
            ) from error
        # Otherwise looked for with each request, in a thread, as are passwords in ~/.netrc, which
        # are not for an API server.
        configuration.client_session_kwargs = {"trust_env": False}
        configuration.proxy = configuration.proxy or _find_proxy(configuration.host)
        client = ApiClient(configuration)
        client.user_agent = "pagoda-operator"
        return cls(client, telemetry)

    async def close(self) -> None:
        await self._client.close()

    async def served_kinds(self, kinds: Collection[str]) -> frozenset[str]:
        """Those of the kinds whose CRDs are installed and served."""
        # Of a group that it does not serve, the API server says so in no JSON.
        groups = (await self._request("GET", "/apis"))["groups"]
        versions = {version["groupVersion"] for group in groups for version in group["versions"]}
        found: set[str] = set()
        for version in sorted(versions & {api_version(kind) for kind in kinds}):
            resources = (await self._request("GET", f"/apis/{version}"))["resources"]
            plurals = {resource["name"] for resource in resources}
            found |= {
                kind
                for kind in kinds
                if api_version(kind) == version and RESOURCES[kind][2] in plurals
            }
        return frozenset(found)

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """The object, or None if there is none."""
        with contextlib.suppress(NotFound):
            return await self._request("GET", _path(kind, namespace, name))
        return None

    async def list(
        self, kind: str, namespace: str | None, selector: str = "", fields: str = ""
    ) -> list[Manifest]:
        """The objects of a namespace (None: of all) that have the labels and the fields."""
        query = {"labelSelector": selector} if selector else {}
        query |= {"fieldSelector": fields} if fields else {}
        found = await self._request("GET", _path(kind, namespace), query=query)
        # Items of a list come without apiVersion and kind.
        return [{"apiVersion": api_version(kind), "kind": kind, **item} for item in found["items"]]

    async def watch(
        self, kind: str, namespace: str | None, fields: str, *, since: str, seconds: float
    ) -> AsyncIterator[Manifest]:
        """Objects with these fields as they come and change, for so long at most.

        Args:
            since: a resourceVersion; empty: begin with those that there are.
        Raises: Unavailable, also where the resourceVersion is too old.
        """
        query = {"watch": "1", "fieldSelector": fields, "timeoutSeconds": str(int(seconds))}
        query |= {"resourceVersion": since} if since else {}
        path = _path(kind, namespace)
        timeout = aiohttp.ClientTimeout(total=seconds + REQUEST_TIMEOUT_SECONDS)
        try:
            request = await self._client.param_serialize(
                "GET", path, query_params=list(query.items()), auth_settings=["BearerToken"]
            )
            answer = await self._client.call_api(*request[:4], _request_timeout=timeout)
            self._telemetry.requests.labels(code=str(answer.status), method="GET").inc()
            async with answer.response:
                if answer.status >= 300:
                    raise Unavailable(f"watch of {path}: {answer.status}")
                async for line in answer.response.content:
                    change = json.loads(line)
                    if change["type"] == "ERROR":
                        raise Unavailable(f"watch of {path}: {change['object'].get('message')}")
                    yield change["object"]
        except (TimeoutError, OSError, aiohttp.ClientError, ValueError) as error:
            raise Unavailable(f"watch of {path}: {error or type(error).__name__}") from error

    async def list_metadata(
        self, kind: str, namespace: str | None, selector: str = ""
    ) -> Sequence[Manifest]:
        """What the metadata of the objects say; a tenth of the whole objects or less."""
        query = {"labelSelector": selector} if selector else {}
        accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
        found = await self._request("GET", _path(kind, namespace), query=query, accept=accept)
        # An empty list of metadata has no items at all.
        return [item["metadata"] for item in found["items"] or ()]

    async def apply(self, manifest: Manifest, *, manager: str, force: bool) -> Manifest:
        """Server-side apply; returns the object as it is afterwards."""
        return await self._apply(_path_of(manifest), manifest, manager=manager, force=force)

    async def write(self, manifest: Manifest) -> Manifest:
        """A new object, or the next version of one; Conflict if another writer was faster."""
        if "resourceVersion" in manifest["metadata"]:
            return await self._request("PUT", _path_of(manifest), body=manifest)
        path = _path(manifest["kind"], manifest["metadata"]["namespace"])
        return await self._request("POST", path, body=manifest)

    async def set_managed_fields(self, manifest: Manifest, metadata: Manifest) -> None:
        """Rewrite who set which field, if the object has the resourceVersion."""
        # A merge patch that names the resourceVersion: a lost race is a Conflict, where a failed
        # test of a JSON patch would be a refusal.
        content_type = "application/merge-patch+json"
        body = {"metadata": metadata}
        await self._request("PATCH", _path_of(manifest), body=body, content_type=content_type)

    async def apply_status(self, manifest: Manifest, *, manager: str) -> Manifest:
        """Server-side apply of the status of an object that exists."""
        path = f"{_path_of(manifest)}/status"
        return await self._apply(path, manifest, manager=manager, force=True)

    async def create_event(self, event: Manifest) -> None:
        """An event of events.k8s.io; it is no error if there is one of that name."""
        path = f"/apis/events.k8s.io/v1/namespaces/{event['metadata']['namespace']}/events"
        with contextlib.suppress(Conflict):
            await self._request("POST", path, body=event)

    async def delete(self, live: Manifest) -> None:
        """Delete the object with exactly this uid; it is no error if there is none."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": live["metadata"]["uid"]},
            "propagationPolicy": "Background",
        }
        with contextlib.suppress(NotFound):
            await self._request("DELETE", _path_of(live), body=body)

    async def _apply(self, path: str, manifest: Manifest, *, manager: str, force: bool) -> Manifest:
        query = {"fieldManager": manager, "force": "true" if force else "false"}
        # With the charset, the client sends the text as it is.
        content_type = "application/apply-patch+yaml; charset=utf-8"
        return await self._request(
            "PATCH", path, query=query, body=_to_yaml(manifest), content_type=content_type
        )

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | str | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Manifest:
        try:
            # Bounds the whole request, a refresh of the credentials and the body included.
            async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
                request = await self._client.param_serialize(
                    method,
                    path,
                    query_params=list((query or {}).items()),
                    header_params={"Accept": accept, "Content-Type": content_type},
                    body=body,
                    auth_settings=["BearerToken"],
                )
                timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_SECONDS)
                response = await self._client.call_api(*request[:4], _request_timeout=timeout)
                answer = json.loads(await response.read())
        except (TimeoutError, OSError, aiohttp.ClientError, ValueError) as error:
            # ValueError: half an answer, or the page of a proxy in between.
            self._telemetry.requests.labels(code="0", method=method).inc()
            what = str(error) or type(error).__name__
            raise Unavailable(f"{method} {path}: no answer: {what}") from error
        self._telemetry.requests.labels(code=str(response.status), method=method).inc()
        if response.status >= 300:
            raise _error(response.status, f"{method} {path}", answer, response.headers)
        return dict(answer)


def _find_proxy(url: str) -> str | None:
    """The proxy that the environment names for an address (HTTPS_PROXY, NO_PROXY)."""
    address = urlsplit(url)
    if urllib.request.proxy_bypass(address.hostname or ""):
        return None
    return urllib.request.getproxies().get(address.scheme)


def context_namespace(context: str | None) -> str:
    """The namespace of a context of the kubeconfig, or of the current one."""
    try:
        contexts, current = config.list_kube_config_contexts()
    except (ConfigException, OSError):
        return "default"
    chosen = next((it for it in contexts if it["name"] == context), current)
    return str(chosen.get("context", {}).get("namespace") or "default")


def own_namespace() -> str | None:
    """The namespace of the pod that this process runs in; None outside of one."""
    try:
        return _OWN_NAMESPACE.read_text().strip() or None
    except OSError:
        return None


def _path(kind: str, namespace: str | None, name: str | None = None) -> str:
    group, version, plural = RESOURCES[kind]
    parts = [f"/apis/{group}/{version}" if group else f"/api/{version}"]
    parts += ["namespaces", namespace, plural] if namespace else [plural]
    return "/".join([*parts, name] if name else parts)


def _path_of(manifest: Manifest) -> str:
    metadata = manifest["metadata"]
    return _path(manifest["kind"], metadata["namespace"], metadata["name"])


def _to_yaml(manifest: Manifest) -> str:
    """JSON that is YAML too, which knows no pairs of escapes for one character, as an emoji."""
    text = json.dumps(manifest, ensure_ascii=False)
    return re.sub(r"[\x7f-\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _error(status: int, request: str, answer: object, headers: Mapping[str, str]) -> ApiError:
    words = answer.get("message") if isinstance(answer, dict) else None
    message = f"{request}: {words or status}"
    if status == 404:
        return NotFound(message)
    if status == 409:
        return Conflict(message)
    if status in (400, 403, 413, 422):
        return Refused(message)
    retry_after = headers.get("Retry-After", "")
    # It may be a date as well, which no API server sends.
    return Unavailable(message, float(retry_after) if retry_after.isdecimal() else 0.0)
