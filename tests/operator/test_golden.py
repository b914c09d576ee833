"""What the operator makes of LLMServices for two GPUs, whole and for people to read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pagoda_operator.render import render_children
from pagoda_operator.spec import parse

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENGINE_IMAGE = "registry.example.com/pagoda-runtime:1"


@pytest.mark.parametrize("name", ["two-gpus", "quantized"])
def test_the_children_of_a_service_for_two_gpus_are_those_of_the_golden_file(name: str) -> None:
    service = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    # What the API server adds.
    uid = f"uid-of-{service['metadata']['name']}"
    service["metadata"] |= {"namespace": "team", "uid": uid, "generation": 1}
    children = render_children(parse(service), engine_image=ENGINE_IMAGE)
    golden = Path(__file__).with_name(f"{name}.golden.yaml")
    assert list(children.values()) == list(yaml.safe_load_all(golden.read_text()))
