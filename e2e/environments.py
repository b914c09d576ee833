"""Environments of tools that the project does not depend on, in the cache folder."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from model import cache_folder
from phases import find_uv


def make_environment(name: str, requirements: Sequence[str]) -> Path:
    """The folder of its programs; made at the first call, and anew when requirements change.

    Raises: subprocess.CalledProcessError, PhaseFailed.
    """
    folder = cache_folder() / name
    marker, wanted = folder / ".made-from", "\n".join(requirements)
    programs = folder / "bin"
    if not marker.exists() or marker.read_text() != wanted:
        uv = find_uv()
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", "3.11", folder], check=True)
        packages = [uv, "pip", "install", "--quiet", "--python", programs / "python", *requirements]
        subprocess.run(packages, check=True)
        marker.write_text(wanted)
    return programs
