"""`up` and `down` of the local cluster, with a second cluster beside the one that is up.

It has folders and a network namespace of its own, so the same addresses and ports are free in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import lifecycle
from cluster.binaries import ensure_binaries
from cluster.processes import ProcessId
from cluster.settings import Settings, environment_settings
from kube import wait_until

TOOL = Path(__file__).resolve().parent / "cluster"
WATCHED = ("/run", "/var/lib", "/var/log", "/etc", "/etc/cni", "/opt")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(os.environ.get("CONTEXT")), reason="another cluster is used"),
]


@dataclass(frozen=True, slots=True)
class Beside:
    """The second cluster."""

    settings: Settings
    environment: dict[str, str]
    namespace: int

    def run(self, *command: str) -> str:
        enter = ["nsenter", f"--target={self.namespace}", "--net", "--"]
        done = subprocess.run(
            [*enter, *command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def tool(self, command: str) -> str:
        return self.run(sys.executable, str(TOOL), command)

    def kubectl(self, *arguments: str) -> str:
        return self.run(*lifecycle.kubectl(self.settings, *arguments))

    def traces(self) -> dict[str, set[str]]:
        """All that a cluster could leave behind outside of its folders."""
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        links = self.run("ip", "-brief", "link").splitlines()
        folders = [Path(folder) for folder in WATCHED if Path(folder).exists()]
        return {
            "mounts": {" ".join(line.split()[3:5]) for line in mounts},
            "links": {line.split()[0] for line in links},
            "tables": set(self.run("nft", "list", "tables").splitlines()),
            "files": {str(path) for folder in folders for path in folder.iterdir()},
            "groups": {
                str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{self.settings.cgroup}")
            },
            "processes": {name for name in commands() if str(self.settings.state) in name},
        }


def commands() -> list[str]:
    """The command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text().replace("\0", " "))
    return found


@pytest.fixture
def beside() -> Iterator[Beside]:
    cache = environment_settings().cache
    ensure_binaries(environment_settings())
    home = Path(tempfile.mkdtemp(prefix="lifecycle-", dir=cache.parent))
    state = Path(tempfile.mkdtemp(prefix="pagoda-", dir="/var/lib"))
    # What is built is the same; everything else is new.
    (home / "cluster").mkdir()
    shutil.copytree(cache / "built", home / "cluster" / "built", copy_function=os.link)
    script = "ip link set lo up && echo up && exec sleep infinity"
    holder = subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    environment = dict(os.environ, PAGODA_CACHE=str(home), PAGODA_CLUSTER_DIR=str(state))
    cluster = Beside(Settings.from_environment(environment), environment, holder.pid)
    state.rmdir()
    try:
        yield cluster
    finally:
        try:
            cluster.tool("down")
        finally:
            holder.kill()
            holder.communicate()
        shutil.rmtree(home)


def test_down_leaves_nothing_of_a_cluster_with_a_pod(beside: Beside) -> None:
    before = beside.traces()
    beside.tool("up")
    run_pod(beside)
    assert beside.traces() != before
    beside.tool("down")
    assert beside.traces() == before
    assert not beside.settings.state.exists()


def test_up_works_after_everything_was_killed(beside: Beside) -> None:
    before = beside.traces()
    beside.tool("up")
    run_pod(beside)
    processes = [ProcessId.read(path) for path in beside.settings.pids.iterdir()]
    for process in processes:
        assert process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    beside.tool("up")
    assert beside.kubectl("get", "pods", "-A", "-o", "name") == ""
    run_pod(beside)
    beside.tool("down")
    assert beside.traces() == before


def test_a_second_up_changes_nothing(beside: Beside) -> None:
    beside.tool("up")
    pids = {path.name: path.read_text() for path in beside.settings.pids.iterdir()}
    assert "up already" in beside.tool("up")
    assert pids == {path.name: path.read_text() for path in beside.settings.pids.iterdir()}


def run_pod(cluster: Beside) -> None:
    """A pod of the node's own image; it runs until it is deleted."""
    image = "127.0.0.1:5000/pause:pagoda"
    cluster.kubectl("run", "still", f"--image={image}", "--restart=Never")
    wait_until(
        "the pod",
        lambda: "Running" in cluster.kubectl("get", "pod", "still"),
        timeout_seconds=60,
        on_timeout=lambda: cluster.kubectl("describe", "pod", "still"),
    )
