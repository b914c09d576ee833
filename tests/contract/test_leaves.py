"""No leaf of the CRD is taken and ignored: another value shows in the children."""

from __future__ import annotations

from pathlib import Path

import leaves
import pytest

from pagoda_operator.names import OPTIONAL_KINDS, digest
from pagoda_operator.render import render_children
from pagoda_operator.testing import make_service

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = leaves.load_schema(ROOT / "crds" / "llmservice.yaml")
LEAVES = [leaf for leaf in leaves.find_leaves(SCHEMA) if str(leaf) not in leaves.SEEN_BY_EFFECT]


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_each_value_of_a_leaf_shows_in_the_children(leaf: leaves.Leaf) -> None:
    specs = [mutation.spec for mutation in leaves.accept(SCHEMA, leaf)]
    seen = [
        {
            digest(child)
            for child in render_children(
                make_service(spec), engine_image="engine:1", served=OPTIONAL_KINDS
            ).values()
        }
        for spec in specs
    ]
    is_auto = "Auto" in leaf.node.get("enum", ())
    # What Auto is, one of the other values may be as well.
    assert len({frozenset(found) for found in seen}) >= len(specs) - is_auto > 0
    assert len(specs) > 1 or leaf.node.get("enum")


def test_leaves_that_show_in_no_spec_of_a_child_are_told() -> None:
    page = (ROOT / "docs" / "reference" / "llmservice.md").read_text()
    known = {str(leaf) for leaf in leaves.find_leaves(SCHEMA)}
    for leaf in leaves.SEEN_BY_EFFECT:
        assert leaf in known
        assert f"`{leaf}`" in page.partition("show in no child")[0].rpartition("\n\n")[2]
