"""The layers of the repository, and what a folder's name must not break."""

from __future__ import annotations

import ast
import operator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "pagoda_operator": ROOT / "operator" / "pagoda_operator",
    "pagoda_runtime": ROOT / "runtime" / "pagoda_runtime",
    "pagoda_kernels": ROOT / "kernels" / "pagoda_kernels",
}
# Which packages and heavy libraries each of our packages may import beside itself.
FORBIDDEN = {
    "pagoda_operator": {"pagoda_runtime", "pagoda_kernels", "torch", "transformers", "triton"},
    "pagoda_runtime": {"pagoda_operator", "kopf", "kubernetes"},
    "pagoda_kernels": {"pagoda_operator", "pagoda_runtime", "kopf", "kubernetes", "transformers"},
}
# Modules that decide and render: no clock, no event loop, no cluster.
PURE = {
    ROOT / "operator" / "pagoda_operator": {
        "names": (
            "spec",
            "flags",
            "pod",
            "render",
            "plan",
            "scaling",
            "status",
            "causes",
            "ownership",
            "names",
        ),
        "forbidden": {"kopf", "kubernetes", "asyncio", "aiohttp", "time", "random"},
    },
    ROOT / "runtime" / "pagoda_runtime" / "engine": {
        "names": ("block_pool", "scheduler", "request"),
        "forbidden": {"torch", "asyncio", "zmq", "time", "random"},
    },
}


def imported_roots(path: Path) -> set[str]:
    roots: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            roots.add(node.module.split(".")[0])
    return roots


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_only_what_its_layer_allows(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for path in files:
        found = imported_roots(path) & FORBIDDEN[package]
        assert not found, f"{path.relative_to(ROOT)} imports {sorted(found)}"


@pytest.mark.parametrize("folder", PURE, ids=lambda folder: folder.name)
def test_deciding_modules_do_no_input_or_output(folder: Path) -> None:
    rule = PURE[folder]
    for name in rule["names"]:
        found = imported_roots(folder / f"{name}.py") & set(rule["forbidden"])
        assert not found, f"{folder.name}/{name}.py imports {sorted(found)}"


def test_only_watch_imports_kopf() -> None:
    importers = {
        path.name
        for path in PACKAGES["pagoda_operator"].rglob("*.py")
        if "kopf" in imported_roots(path)
    }
    assert importers == {"watch.py"}


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
