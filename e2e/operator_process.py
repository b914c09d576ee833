"""The operator as a process of the test's own, which can be killed at any moment."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from kube import Kubectl, wait_until
from rights import kubeconfig_of_chart
from stack import OPERATOR_NAMESPACE

ENGINE_IMAGE = "pagoda.invalid/engine:1"


class OperatorProcess:
    """`pagoda-operator` for one namespace, or for all; its log is kept in a file.

    Args:
        kubeconfig: by default one with the rights that the chart gives.
    """

    def __init__(
        self,
        kubectl: Kubectl,
        log: Path,
        *,
        kubeconfig: str | None = None,
        is_cluster_wide: bool = False,
        engine_image: str = ENGINE_IMAGE,
        flags: Sequence[str] = (),
    ) -> None:
        namespace = "" if is_cluster_wide else kubectl.namespace
        self._flags = ["--engine-image", engine_image, "--namespace", namespace, *flags]
        self._log = log
        self._kubectl = kubectl
        self._kubeconfig = kubeconfig or kubeconfig_of_chart(
            kubectl, log.parent, is_cluster_wide=is_cluster_wide
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @contextlib.contextmanager
    def running(self) -> Iterator[OperatorProcess]:
        """Run it for a while, in which the operator that the chart installed stands still."""
        with without_installed_operator(self._kubectl):
            self.start()
            try:
                yield self
            finally:
                self.stop()

    def start(self, *, wait: bool = True) -> None:
        """Start the process, and by default wait until it is ready."""
        self._port = _free_port()
        command = [sys.executable, "-m", "pagoda_operator.main", *self._flags]
        command += ["--health-port", str(self._port)]
        environment = dict(os.environ)
        environment["KUBECONFIG"] = self._kubeconfig
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        if wait:
            wait_until(
                "operator ready", self._is_ready, timeout_seconds=120, on_timeout=lambda: self.log
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status. A process that has ended already is no error."""
        assert self._process is not None
        self._process.terminate()
        return self.wait_ended()

    def wait_ended(self) -> int:
        """Wait for the end of a process that was told to; returns the exit status."""
        assert self._process is not None
        try:
            # As long as a pod has.
            return self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def _is_ready(self) -> bool:
        assert self.is_running, self.log
        return self.readiness() == "ok"

    def readiness(self) -> str:
        """The words of /readyz."""
        try:
            url = f"http://127.0.0.1:{self._port}/readyz"
            with urllib.request.urlopen(url, timeout=2) as response:
                return str(response.read().decode().strip())
        except urllib.error.HTTPError as error:
            return str(error.read().decode().strip())
        except OSError as error:
            return str(error)


@contextlib.contextmanager
def without_installed_operator(kubectl: Kubectl) -> Iterator[None]:
    """Stop the operator that the chart installed, if there is one, as nobody but a test should be
    served by the test's. Within another such while it stands still anyway.
    """
    installed = kubectl.in_namespace(OPERATOR_NAMESPACE)
    deployment = installed.get("deployment", "pagoda-operator")
    if deployment is None or deployment["spec"]["replicas"] == 0:
        yield
        return
    scale = ("scale", "deployment/pagoda-operator")
    installed.run(*scale, "--replicas=0")
    selector = ("-l", "app.kubernetes.io/name=pagoda-operator")
    wait_until(
        "the installed operator stopped",
        lambda: not installed.items("pods", *selector),
        timeout_seconds=120,
    )
    try:
        yield
    finally:
        installed.run(*scale, "--replicas=1")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def installed_engine_image(kubectl: Kubectl) -> str | None:
    """The image of engines that the installed operator was given; None if there is none."""
    found = kubectl.in_namespace(OPERATOR_NAMESPACE).get("deployment", "pagoda-operator")
    if found is None:
        return None
    flags = found["spec"]["template"]["spec"]["containers"][0]["args"]
    (image,) = (flag.partition("=")[2] for flag in flags if flag.startswith("--engine-image="))
    return str(image)


def pids_in_pods() -> list[int]:
    """The operator's processes in its pods, as this machine sees them."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                in_pod = b"kubepods" in (folder / "cgroup").read_bytes()
            except OSError:
                continue
            if in_pod and any(part.endswith(b"pagoda-operator") for part in command[:2]):
                found.append(int(folder.name))
    return found
