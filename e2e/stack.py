"""What the demo and the end-to-end tests put on a cluster: images, operator, model volume."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import model
from kube import Kubectl, KubectlError, condition, wait_until

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "pagoda"
OPERATOR_NAMESPACE = "pagoda-system"
LOADER = "pagoda-model-loader"


class StackError(Exception):
    """A part could not be put in place; the message says why and what helps."""


@dataclass(frozen=True, slots=True)
class Target:
    """The cluster to use: the local one, or the one that CONTEXT and REGISTRY name."""

    kubectl: Kubectl
    helm: str
    registry: str | None

    @property
    def is_local(self) -> bool:
        return self.registry is None

    @staticmethod
    def from_environment() -> Target:
        context, registry = os.environ.get("CONTEXT"), os.environ.get("REGISTRY")
        if bool(context) != bool(registry):
            raise StackError(
                "CONTEXT and REGISTRY go together: the cluster to use, and a registry that both "
                "this machine can push to and the cluster can pull from."
            )
        if context:
            kubectl, helm = shutil.which("kubectl"), shutil.which("helm")
            if not kubectl or not helm:
                raise StackError("With CONTEXT, kubectl and helm must be on the PATH.")
            return Target(Kubectl(kubectl, context=context), helm, registry)
        paths = cluster_paths()
        return Target(
            Kubectl(paths["kubectl"], kubeconfig=paths["kubeconfig"]), paths["helm"], None
        )


def cluster_paths() -> dict[str, str]:
    """Where the local cluster's kubectl, helm and kubeconfig are."""
    text = _cluster_tool("paths")
    paths: dict[str, str] = json.loads(text.strip().splitlines()[-1])
    return paths


def build_images(target: Target) -> dict[str, str]:
    """Build and push what changed; returns the references of the runtime's and operator's image."""
    arguments = ["images"] + ([] if target.registry is None else ["--registry", target.registry])
    images: dict[str, str] = json.loads(_cluster_tool(*arguments).strip().splitlines()[-1])
    return images


def apply_crds(kubectl: Kubectl) -> None:
    """The CRDs of this tree, without an operator."""
    kubectl.run("apply", "--server-side", "--force-conflicts", "-k", str(ROOT / "crds"))


def wait_for_crds(kubectl: Kubectl, *names: str) -> None:
    """Until they are served; `kubectl wait` fails on those that have no condition yet."""
    wait_until(
        f"CRDs {names}",
        lambda: all(
            condition(kubectl.get("crd", name) or {}, "Established").get("status") == "True"
            for name in names
        ),
        timeout_seconds=60,
    )


def install_operator(target: Target, images: dict[str, str]) -> None:
    """Install or upgrade the chart, and wait until the operator is ready."""
    kubectl = target.kubectl.in_namespace(OPERATOR_NAMESPACE)
    command = [target.helm, "upgrade", "--install", "pagoda", str(CHART)]
    command += ["--namespace", OPERATOR_NAMESPACE, "--create-namespace"]
    # The CRD may be there without a release, or be another release's.
    command += ownership_flags(target)
    command += ["--set", f"image={images['operator']}", "--set", f"engineImage={images['runtime']}"]
    # Nothing beyond this machine.
    command += ["--set", "hubEndpoint="]
    if kubectl.kubeconfig:
        command += ["--kubeconfig", kubectl.kubeconfig]
    if kubectl.context:
        command += ["--kube-context", kubectl.context]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StackError(f"helm: {done.stderr.strip()}")
    # An end-to-end test that was killed may have left it at none.
    kubectl.run("scale", "deployment/pagoda-operator", "--replicas=1")
    try:
        # A busy node gives it three minutes for its start.
        flags = ("--timeout=240s",)
        kubectl.run("rollout", "status", "deployment/pagoda-operator", *flags, timeout_seconds=250)
    except KubectlError as error:
        logs = kubectl.run("logs", "deployment/pagoda-operator", "--tail=20")
        raise StackError(f"The operator does not become ready: {error}\n{logs}") from error


def ownership_flags(target: Target) -> list[str]:
    """With these Helm takes over what others applied; from 4 on it applies server-side."""
    version = subprocess.run(
        [target.helm, "version", "--template={{.Version}}"], capture_output=True, text=True
    )
    forced = ["--force-conflicts"] if version.stdout.startswith("v4") else []
    return ["--take-ownership", *forced]


def ensure_model_volume(
    target: Target, kubectl: Kubectl, images: dict[str, str], folders: Sequence[Path] = ()
) -> None:
    """A claim `models` that holds the converted model, and these folders beside it, by their names.

    On the local cluster it is the cache folder itself; elsewhere the cluster's default storage
    class makes it, and a pod takes the files in.
    """
    volume = _volume_name(kubectl.namespace) if target.is_local else None
    if volume:
        if kubectl.get("pvc", "models") is None:
            # A volume that belonged to a claim of an earlier run binds to no other.
            kubectl.run("delete", "pv", volume, "--ignore-not-found")
        kubectl.apply(_local_volume(volume, kubectl.namespace))
    kubectl.apply(_claim(volume))
    if not target.is_local:
        for folder in (model.model_folder(), *folders):
            _upload_model(kubectl, images["runtime"], folder)


def _local_volume(name: str, namespace: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "4Gi"},
            "accessModes": ["ReadOnlyMany", "ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "claimRef": {"namespace": namespace, "name": "models"},
            "hostPath": {"path": str(model.model_folder().parent), "type": "Directory"},
        },
    }


def _claim(volume: str | None) -> dict[str, object]:
    spec: dict[str, object] = {
        "accessModes": ["ReadWriteMany" if volume else "ReadWriteOnce"],
        "resources": {"requests": {"storage": "4Gi"}},
    }
    if volume:
        spec |= {"storageClassName": "", "volumeName": volume}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models"},
        "spec": spec,
    }


def _upload_model(kubectl: Kubectl, image: str, folder: Path) -> None:
    """Copy a model into the claim through a pod, unless this very model is there already."""
    marker = model.marker_of(folder)
    mount = "/models"
    kubectl.run("delete", "pod", LOADER, "--ignore-not-found", "--wait")
    kubectl.apply(_loader_pod(image, mount))
    kubectl.run(
        "wait", "--for=condition=Ready", f"pod/{LOADER}", "--timeout=900s", timeout_seconds=930
    )
    try:
        inside = ("exec", LOADER, "--", "cat", f"{mount}/{marker.name}")
        try:
            if kubectl.run(*inside) == marker.read_text():
                return
        except KubectlError:
            pass  # not there yet
        script = f"cd {mount} && rm -rf {folder.name} && tar xf -"
        archive = subprocess.Popen(
            ["tar", "cf", "-", "-C", str(folder.parent), folder.name, marker.name],
            stdout=subprocess.PIPE,
        )
        upload = kubectl.command("exec", "-i", LOADER, "--", "sh", "-c", script)
        done = subprocess.run(upload, stdin=archive.stdout, check=False)
        if archive.wait() != 0 or done.returncode != 0:
            raise StackError("the model could not be copied into the claim `models`.")
    finally:
        kubectl.run("delete", "pod", LOADER, "--ignore-not-found", "--wait")


def _loader_pod(image: str, mount: str) -> dict[str, Any]:
    pod = client_pod(LOADER, image, ["sleep", "3600"])
    pod["spec"]["volumes"] = [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}]
    pod["spec"]["containers"][0]["volumeMounts"] = [{"name": "models", "mountPath": mount}]
    return pod


@contextlib.contextmanager
def fresh_namespace(kubectl: Kubectl) -> Iterator[Kubectl]:
    """kubectl in a namespace of a new name, deleted afterwards without waiting."""
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    made = kubectl.in_namespace(name)
    kubectl.run("create", "namespace", name)
    try:
        wait_for_account(made)
        yield made
    finally:
        kubectl.run("delete", "namespace", name, "--wait=false")


@contextlib.contextmanager
def restricted_namespace(kubectl: Kubectl, name: str) -> Iterator[Kubectl]:
    """kubectl in a namespace that lets in nothing but Pod Security restricted. Its pods have ended
    afterwards; itself and the volume of its model are going. The cluster has the CRD.
    """
    _wait_for_namespace_gone(kubectl, name)
    kubectl.run("delete", "pv", _volume_name(name), "--ignore-not-found")
    made = kubectl.in_namespace(name)
    kubectl.run("create", "namespace", name)
    kubectl.run("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    try:
        wait_for_account(made)
        yield made
    finally:
        _end_pods(made)
        kubectl.run("delete", "namespace", name, "--wait=false")
        kubectl.run("delete", "pv", _volume_name(name), "--ignore-not-found", "--wait=false")


def wait_for_account(kubectl: Kubectl) -> None:
    """Until a new namespace takes pods that name no service account."""
    wait_until(
        f"the account of the namespace {kubectl.namespace}",
        lambda: kubectl.get("serviceaccount", "default"),
    )


def _end_pods(kubectl: Kubectl) -> None:
    """Let all pods end, so that what follows has the node for itself.

    What they do with their grace is told by tests of it.
    """
    kubectl.run("delete", "llmservices", "--all")
    kubectl.run("delete", "pods", "--all", "--grace-period=1", "--wait=false")
    wait_until("the pods ended", lambda: not kubectl.items("pods"), timeout_seconds=120)


def _volume_name(namespace: str) -> str:
    return f"models-{namespace}"


def _wait_for_namespace_gone(kubectl: Kubectl, name: str) -> None:
    kubectl.run("delete", "namespace", name, "--ignore-not-found", "--wait=false")
    wait_until(
        f"namespace {name} gone",
        lambda: kubectl.get("namespace", name) is None,
        timeout_seconds=120,
    )


def _cluster_tool(*arguments: str) -> str:
    """Run e2e/cluster; its progress goes to the screen, its last line is the answer."""
    command = ["python3", str(ROOT / "e2e" / "cluster"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if not line.startswith("{"):
                print(line, end="", flush=True)
    if process.returncode != 0:
        raise StackError(f"`{' '.join(command)}` ended with status {process.returncode}.")
    return "".join(lines)


def client_pod(name: str, image: str, command: list[str]) -> dict[str, Any]:
    """A pod that runs one command once, under Pod Security restricted."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "client",
                    "image": image,
                    "command": command,
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ],
        },
    }
