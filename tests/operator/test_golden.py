"""What the operator makes of an LLMService for two GPUs, whole and for people to read."""

from __future__ import annotations

from pathlib import Path

import yaml

from pagoda_operator.render import render_children
from pagoda_operator.spec import parse

SERVICE = Path(__file__).resolve().parents[2] / "examples" / "two-gpus.yaml"
CHILDREN = Path(__file__).with_name("two-gpus.golden.yaml")
ENGINE_IMAGE = "registry.example.com/pagoda-runtime:1"


def test_the_children_of_a_service_for_two_gpus_are_those_of_the_golden_file() -> None:
    service = yaml.safe_load(SERVICE.read_text())
    # What the API server adds.
    service["metadata"] |= {"namespace": "team", "uid": "uid-of-llama-70b", "generation": 1}
    children = render_children(parse(service), engine_image=ENGINE_IMAGE)
    assert list(children.values()) == list(yaml.safe_load_all(CHILDREN.read_text()))
