"""Bringing the cluster up, taking it down, and telling how it stands."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import components, configuration, manifests, mount_points, network, node, pki, store
from .binaries import ensure_binaries
from .buildah import Buildah, verify_place
from .console import phase, say
from .packages import ensure_packages, require_root
from .processes import log_end, running, start, stop
from .settings import DNS_SERVICE_IP, NODE_NAME, ClusterError, Settings

# In the order of starting; they are stopped the other way round.
NAMES = (
    "registry",
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "coredns",
    "node",
    "containerd",
    "kubelet",
)
WAIT_SECONDS = 90.0


def up(settings: Settings) -> None:
    """Bring the cluster up, from whatever state the last run left it in."""
    require_root()
    verify_place(settings.cache)
    with one_at_a_time(settings):
        if is_up(settings):
            say(f"  the cluster is up already: {settings.kubeconfig}")
            return
        with phase("Debian packages"):
            ensure_packages(settings)
        with phase("programs"):
            ensure_binaries(settings)
        with phase("clear the last run"):
            clear(settings)
        try:
            _start_all(settings)
        except ClusterError:
            say("  the cluster did not come up; its logs stay in " + str(settings.logs))
            raise


def _start_all(settings: Settings) -> None:
    with phase("certificates"):
        pki.write_certificates(settings)
        pki.write_kubeconfigs(settings)
        configuration.write_all(settings)
    with phase("network"):
        network.set_up(settings)
        node.make_cgroups(settings.cgroup)
    with phase("API server"):
        start(settings, components.registry(settings))
        start(settings, components.etcd(settings))
        start(settings, components.api_server(settings))
        inside = node.start_node(settings)
        wait_for(settings, "kube-apiserver", lambda: api_says(settings, "/readyz") == "ok")
    with phase("node"):
        start(settings, components.controller_manager(settings))
        start(settings, components.scheduler(settings))
        store.push_pause_image(settings)
        start(settings, components.containerd(settings), inside)
        _kubectl_apply(settings, manifests.system_objects())
        start(settings, components.coredns(settings))
        start(settings, components.kube_proxy(settings))
        wait_for(settings, "containerd", lambda: store.answers(settings, inside))
        start(settings, components.kubelet(settings), inside)
        wait_for(settings, "kubelet", lambda: _node_is_ready(settings))
    with phase("name service"):
        wait_for(settings, "coredns", _name_service_answers)
        wait_for(settings, "kube-controller-manager", lambda: has_default_account(settings))


def down(settings: Settings) -> None:
    """Stop everything and leave nothing outside the cache folder."""
    require_root()
    with one_at_a_time(settings), phase("down"):
        clear(settings)
        mount_points.remove(Buildah(settings.cache).mount_points)
        shutil.rmtree(settings.state, ignore_errors=True)
        if settings.state.exists():
            raise ClusterError(f"{settings.state} could not be removed: it is still in use.")


def clear(settings: Settings) -> None:
    """End what is left of the last run and take away its traces; logs stay until the next `up`."""
    for name in ("kubelet", "containerd"):
        # They die with the node; stopping containerd kindly spares its store a recovery.
        stop(settings, name, grace_seconds=2.0)
    node.stop_node(settings)
    for name in reversed(NAMES):
        stop(settings, name)
    network.tear_down(settings)
    store.forget_containers(settings)
    if settings.state.exists():
        for path in settings.state.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def is_up(settings: Settings) -> bool:
    return not not_running(settings) and _node_is_ready(settings)


def not_running(settings: Settings) -> list[str]:
    return [name for name in NAMES if running(settings, name) is None]


def status(settings: Settings) -> list[str]:
    """A line for each process and for the node."""
    lines = []
    for name in NAMES:
        process = running(settings, name)
        lines.append(f"{name:<26} {f'process {process.pid}' if process else 'not running'}")
    ready = not not_running(settings) and _node_is_ready(settings)
    lines.append(f"{NODE_NAME:<26} {'Ready' if ready else 'not ready'}")
    return lines


def paths(settings: Settings) -> dict[str, str]:
    return {
        "kubectl": str(settings.bin / "kubectl"),
        "helm": str(settings.bin / "helm"),
        "kubeconfig": str(settings.kubeconfig),
        "audit_log": str(settings.audit_log),
    }


@contextmanager
def one_at_a_time(settings: Settings) -> Iterator[None]:
    """Hold the lock of the cache: two would build the same program."""
    settings.cache.mkdir(parents=True, exist_ok=True)
    with (settings.cache / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("  waiting for another `up` or `down` to end …")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wait_for(settings: Settings, name: str, is_done: Callable[[], bool]) -> None:
    """Wait for a process to do its part. Raises ClusterError with its log if it ends or hangs."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_done():
        if running(settings, name) is None:
            raise ClusterError(f"{name} ended. {log_end(settings, name)}")
        if time.monotonic() > deadline:
            words = log_end(settings, name)
            raise ClusterError(f"{name} was not ready after {WAIT_SECONDS:.0f} s. {words}")
        time.sleep(0.1)


def kubectl(settings: Settings, *arguments: str) -> list[str]:
    return [str(settings.bin / "kubectl"), f"--kubeconfig={settings.kubeconfig}", *arguments]


def _environment(settings: Settings) -> dict[str, str]:
    """kubectl would leave what it learns of the API in the user's home."""
    return dict(os.environ, KUBECACHEDIR=str(settings.state / "kubectl"))


def api_says(settings: Settings, path: str) -> str:
    if not settings.kubeconfig.exists():
        return ""
    command = kubectl(settings, "get", "--raw", path)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=_environment(settings)
    )
    return done.stdout if done.returncode == 0 else ""


def _node_is_ready(settings: Settings) -> bool:
    answer = api_says(settings, f"/api/v1/nodes/{NODE_NAME}")
    if not answer:
        return False
    conditions = json.loads(answer).get("status", {}).get("conditions", [])
    return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)


def has_default_account(settings: Settings) -> bool:
    """Pods are refused until the controller manager has made the namespace's service account."""
    return bool(api_says(settings, "/api/v1/namespaces/default/serviceaccounts/default"))


def _kubectl_apply(settings: Settings, manifest: manifests.Manifest) -> None:
    done = subprocess.run(
        kubectl(settings, "apply", "-f", "-"),
        input=json.dumps(manifest),
        capture_output=True,
        text=True,
        check=False,
        env=_environment(settings),
    )
    if done.returncode != 0:
        raise ClusterError(f"kubectl apply: {done.stderr.strip()}")


def _name_service_answers() -> bool:
    """Whether the address of `kubernetes.default` comes back through the name service's Service."""
    labels = ("kubernetes", "default", "svc", "cluster", "local")
    name = b"".join(bytes([len(label)]) + label.encode() for label in labels) + b"\0"
    query = b"\x13\x37\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + name + b"\x00\x01\x00\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(0.5)
        try:
            udp.sendto(query, (DNS_SERVICE_IP, 53))
            answer = udp.recv(512)
        except OSError:
            return False
    return answer[:2] == b"\x13\x37" and int.from_bytes(answer[6:8]) > 0
