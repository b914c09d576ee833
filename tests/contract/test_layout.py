"""The layers of the repository, and what a folder's name must not break."""

from __future__ import annotations

import operator
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_import_is_one_that_the_contracts_allow() -> None:
    # A process of its own: import-linter turns the loggers of its process off.
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(
        [*command, ROOT / "pyproject.toml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_top_folders_are_no_packages() -> None:
    # An importable `operator` would shadow the standard library's.
    for folder in ("operator", "runtime", "kernels"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not str(operator.__file__).startswith(str(ROOT))


def test_locked_requirements_carry_hashes_and_name_no_index() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text()
        assert "--hash=sha256:" in text
        assert "://" not in text
        assert "--index-url" not in text
