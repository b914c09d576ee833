"""The page of reasons has those that the operator can write, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pagoda_operator
from pagoda_operator.containers import CREATE_REASONS, KINDS, START_WARNINGS
from pagoda_operator.last_words import FATAL_REASONS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reference/status.md"
MISSING = {f"{kind}Missing" for kind in KINDS.values()}
# What stands in place of a reason where a module makes a cause: all that it can be.
COMPUTED: dict[str, set[str]] = {
    "containers: str(event['reason'])": set(START_WARNINGS),
    "containers: waiting['reason']": set(CREATE_REASONS),
    "containers: f'{kind}Missing'": MISSING,
    "containers: reason": set(FATAL_REASONS),
    "preflight: error.reason": set(FATAL_REASONS),
    # Found where they come from: arguments of cause_of_refusal, and what _find_wants yields.
    "causes: reason": set(),
    "scheduling: reason": set(),
    "loads: cause.reason": set(),
}
CONDITIONS = {"Ready", "Available", "Reconciling", "Stalled", "AutoscalingActive"}
WORD = re.compile(r"[A-Z][A-Za-z]+")


def find_reasons(module: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("Cause", "cause_of_refusal"):
                yield from _values(module, node.args[0])
        elif isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
            # Of scheduling: pairs of a reason and its words.
            first = node.value.elts[0]
            if module == "scheduling" and isinstance(first, ast.Constant):
                yield str(first.value)
        elif isinstance(node, ast.For) and module == "scheduling":
            assert isinstance(node.iter, ast.Tuple)
            for row in node.iter.elts:
                assert isinstance(row, ast.Tuple)
                yield from _values(module, row.elts[1])


def _values(module: str, node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.IfExp):
        yield from _values(module, node.body)
        yield from _values(module, node.orelse)
    elif isinstance(node, ast.Constant):
        yield str(node.value)
    else:
        yield from COMPUTED[f"{module}: {ast.unparse(node)}"]


def find_words(tree: ast.Module) -> Iterator[str]:
    """Of `status`, which says reasons of its own in many forms: whatever looks like one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and WORD.fullmatch(str(node.value)):
            yield str(node.value)


def test_every_reason_has_its_section_and_every_section_a_reason() -> None:
    reasons: set[str] = set()
    for path in Path(pagoda_operator.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        reasons |= set(find_reasons(path.stem, tree))
        if path.stem == "status":
            words = set(find_words(tree)) - {"True", "False", "Unknown", "None"}
            # A reason as well: of Reconciling, while Stalled is True.
            reasons |= words - (CONDITIONS - {"Stalled"})
    sections = re.findall(r"^### (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(sections) == len(set(sections))
    assert set(sections) == reasons


def test_every_section_says_something() -> None:
    parts = re.split(r"^##+ .*$", PAGE.read_text(), flags=re.MULTILINE)
    sections = re.split(r"^### ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert len(parts) > len(sections)
    assert all(len(section.split("\n", 1)[1].strip()) > 20 for section in sections)
