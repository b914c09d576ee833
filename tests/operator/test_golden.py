"""What the operator makes of LLMServices, whole and for people to read.

A pod template that differs from the golden one restarts every engine of every user when they
upgrade the operator. After a change that is meant to, say so in CHANGELOG.md and write the files
anew: `python tests/operator/test_golden.py`.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pagoda_operator.decode import camel_case
from pagoda_operator.names import Manifest
from pagoda_operator.render import render_children
from pagoda_operator.spec import LLMServiceSpec, parse

FOLDER = Path(__file__).parent
EXAMPLES = FOLDER.parents[1] / "examples"
FILES = sorted([*EXAMPLES.glob("*.yaml"), *(FOLDER / "specs").glob("*.yaml")])
ENGINE_IMAGE = "registry.example.com/pagoda-runtime:1"
ROLLS = (
    "this change rolls every engine of every user whose spec is like {}, when they upgrade the "
    "operator; see the docstring of this module"
)
# What they say is the operator's, or of other children than pods.
NOT_OF_PODS = ("replicas", "suspend", "autoscaling", "rollout", "disruption", "networkPolicy",
               "observability")  # fmt: skip


def render(path: Path) -> list[Manifest]:
    service = yaml.safe_load(path.read_text())
    # What the API server adds.
    uid = f"uid-of-{service['metadata']['name']}"
    service["metadata"] |= {"namespace": "team", "uid": uid, "generation": 1}
    return list(render_children(parse(service), engine_image=ENGINE_IMAGE).values())


def golden_of(path: Path) -> Path:
    return FOLDER / "golden" / path.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_children_of_a_service_are_those_of_the_golden_file(path: Path) -> None:
    found, golden = render(path), list(yaml.safe_load_all(golden_of(path).read_text()))
    for made, expected in zip(found, golden, strict=True):
        if made["kind"] == "Deployment":
            assert made["spec"]["template"] == expected["spec"]["template"], ROLLS.format(path.name)
        assert made == expected


def leaves(cls: Any, path: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        name = f"{path}.{camel_case(field.name)}"
        options = (hints[field.name], *typing.get_args(hints[field.name]))
        inner = next((it for it in options if is_dataclass(it)), None)
        yield from [name] if inner is None else leaves(inner, name)


def has(spec: Any, path: str) -> bool:
    for name in path.split(".")[1:]:
        if not isinstance(spec, dict) or name not in spec:
            return False
        spec = spec[name]
    return True


def test_every_field_that_shows_in_pods_is_in_a_golden_file() -> None:
    specs = [yaml.safe_load(path.read_text())["spec"] for path in FILES]
    wanted = [it for it in leaves(LLMServiceSpec, "spec") if it.split(".")[1] not in NOT_OF_PODS]
    assert [path for path in wanted if not any(has(spec, path) for spec in specs)] == []


if __name__ == "__main__":
    for each in FILES:
        text = yaml.safe_dump_all(render(each), sort_keys=False)
        head = f"# What the operator makes of {each.name}, in the namespace `team`.\n"
        golden_of(each).write_text(head + text)
