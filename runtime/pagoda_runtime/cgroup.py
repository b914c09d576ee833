"""The cgroups of this process, of version 1 and 2."""

from __future__ import annotations

from pathlib import Path


def cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The cgroup of this process and its parents. root: that of the file system."""
    folders: list[Path] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return folders
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = mount / controller if controllers else mount
        # In a container the path may be the host's; the mount itself is then the container's own.
        folder = base / path.lstrip("/")
        while folder != base and base in folder.parents:
            folders.append(folder)
            folder = folder.parent
        folders.append(base)
    return [folder for folder in folders if folder.is_dir()]


def read_counters(file: Path) -> dict[str, int]:
    """A file of names and numbers; empty if there is none."""
    try:
        lines = [line.split(maxsplit=1) for line in file.read_text().splitlines()]
        return {name: int(number) for name, number in lines}
    except (OSError, ValueError):
        return {}
