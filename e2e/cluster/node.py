"""The node: namespaces in which containerd, kubelet and all pods live, and die together.

kubelet and containerd make mounts, sockets and processes in places that cannot all be configured.
In a pid and a mount namespace of their own, the kernel clears everything up the moment their first
process ends, however it ends.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from . import mount_points
from .console import output_of
from .processes import PROC, ProcessId, Program, log_end, start, stop, wait_gone
from .settings import ClusterError, Settings

NAME = "node"
# Folders that containerd, kubelet and CNI write to wherever they are told to write; inside the node
# they are folders of ours. The empty folders that serve as mount points are removed afterwards.
PRIVATE_FOLDERS = (
    "/run/containerd",
    "/var/log/containers",
    "/var/lib/cni",
    "/var/lib/kubelet",
)
CGROUPS = Path("/sys/fs/cgroup")


def start_node(settings: Settings) -> ProcessId:
    """Make the namespaces; returns their first process, as seen from outside."""
    lines = ["set -e", "mount -t proc proc /proc"]
    for folder in PRIVATE_FOLDERS:
        private = settings.state / "node" / folder.strip("/").replace("/", "-")
        private.mkdir(parents=True, exist_ok=True)
        mount_points.make(Path(folder), settings.state / "mount-points")
        lines.append(f"mount --bind '{private}' '{folder}'")
    # Volumes that kubelet mounts have to appear in containerd's eyes, and in pods that ask for it.
    lines += ["mount --make-rshared /", 'touch "$1"', "exec sleep infinity"]
    ready = settings.state / "node" / "ready"
    ready.unlink(missing_ok=True)
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    program = Program(NAME, [*command, "sh", "-c", "\n".join(lines), "sh", str(ready)])
    outside = start(settings, program)
    first = _wait_first_process(settings, outside, ready)
    first.write(settings.pids / f"{NAME}-init")
    return first


def _wait_first_process(settings: Settings, outside: ProcessId, ready: Path) -> ProcessId:
    deadline = time.monotonic() + 10
    while not ready.exists():
        if not outside.is_alive or time.monotonic() > deadline:
            raise ClusterError(
                "the node's namespaces could not be made; the local cluster needs the rights to "
                f"unshare and mount. {log_end(settings, NAME)}"
            )
        time.sleep(0.02)
    children = _children(outside.pid)
    first = ProcessId.of(children[0]) if children else None
    if first is None:
        raise ClusterError(f"the node's first process ended. {log_end(settings, NAME)}")
    return first


def _children(pid: int) -> list[int]:
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def stop_node(settings: Settings) -> None:
    """Kill the namespaces' first process, and with it all others; then remove what they leave."""
    first = ProcessId.read(settings.pids / f"{NAME}-init")
    if first and first.is_alive:
        os.kill(first.pid, signal.SIGKILL)
        if not wait_gone(first, 20):
            raise ClusterError(f"the node (process {first.pid}) does not end, even by SIGKILL.")
    (settings.pids / f"{NAME}-init").unlink(missing_ok=True)
    stop(settings, NAME)
    _remove_cgroups(settings.cgroup)
    mount_points.remove(settings.state / "mount-points")


def make_cgroups(name: str) -> None:
    """The group under which kubelet puts pods, in every hierarchy that this machine has."""
    for hierarchy in _hierarchies():
        (hierarchy / name).mkdir(exist_ok=True)
        if hierarchy.name == "cpuset":
            _inherit_cpuset(hierarchy, hierarchy / name)


def _inherit_cpuset(parent: Path, group: Path) -> None:
    """A new cpuset (cgroup v1) has no processors and no memory, and nothing can run in it."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        (group / name).write_text((parent / name).read_text())


def _hierarchies() -> list[Path]:
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    links_resolved = {path.resolve() for path in CGROUPS.iterdir() if path.is_dir()}
    return sorted(path for path in links_resolved if (path / "cgroup.procs").exists())


def _remove_cgroups(name: str) -> None:
    for hierarchy in _hierarchies():
        group = hierarchy / name
        if not group.exists():
            continue
        for folder, _, _ in os.walk(group, topdown=False):
            _remove_group(Path(folder))


def _remove_group(group: Path) -> None:
    """A group is empty only some milliseconds after its last process has ended."""
    for _ in range(100):
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
    raise ClusterError(f"the control group {group} is still in use.")


def enter_command(first: ProcessId, *command: str) -> list[str]:
    """The command line that runs a command inside the node."""
    return ["nsenter", f"--target={first.pid}", "--mount", "--pid", "--", *command]


def run_inside(first: ProcessId, *command: str) -> str:
    return output_of(*enter_command(first, *command))
