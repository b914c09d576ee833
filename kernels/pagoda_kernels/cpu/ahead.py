"""Compile all kernels before they are wanted: `python -m pagoda_kernels.cpu.ahead`.

For every target, whatever processor this machine has, into a folder of the installed package. A
program that finds them there starts without the compiler's 10 to 15 s.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pagoda_kernels
from pagoda_kernels.cpu.cache import AHEAD_FOLDER
from pagoda_kernels.cpu.compiled import KERNELS
from pagoda_kernels.cpu.targets import Target, features, targets_of


def main() -> None:
    """The exit status is 0 if every kernel was compiled for every target."""
    failed = compile_ahead(targets_of(platform.machine()), AHEAD_FOLDER)
    if failed:
        sys.exit(f"Kernels could not be compiled for {', '.join(failed)}.")


def compile_ahead(targets: Sequence[Target], base: Path) -> list[str]:
    """Compile for each target in a process of its own; the names of those that failed.

    Args:
        base: the folder in whose `kernels` they are kept, for all users to read.
    """
    children = []
    for target in targets:
        code = "from pagoda_kernels.cpu.ahead import compile_all; compile_all()"
        aim = {
            "NUMBA_CPU_NAME": target.cpu,
            "NUMBA_CPU_FEATURES": target.feature_flags,
            "PAGODA_CACHE": str(base),
        }
        children.append(subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **aim}))
    failed = [
        target.name for target, child in zip(targets, children, strict=True) if child.wait() != 0
    ]
    for path in (base, *base.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return failed


def compile_all() -> None:
    """Compile what this process's target can run, or find it in files."""
    for module in pkgutil.walk_packages(pagoda_kernels.__path__, "pagoda_kernels."):
        importlib.import_module(module.name)
    for needs, prepare in KERNELS:
        if needs <= features():
            prepare()


if __name__ == "__main__":
    main()
