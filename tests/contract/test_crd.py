"""The CRD, the operator's dataclasses, the chart and the documentation say the same."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec import to_builtins

from pagoda_operator.cause import Cause
from pagoda_operator.checkpoint import Tensors, read_checkpoint
from pagoda_operator.decode import camel_case
from pagoda_operator.loads import parse_progress
from pagoda_operator.names import GROUP, KIND, PLURAL, VERSION
from pagoda_operator.preflight import check, unchecked
from pagoda_operator.reports import parse_report
from pagoda_operator.rollout import Rollout
from pagoda_operator.scaling import ScalingPolicy
from pagoda_operator.spec import LLMServiceSpec, Strategy, parse
from pagoda_operator.status import failed_status, make_status, stamp
from pagoda_operator.testing import LLAMA_8B, make_manifest, make_service
from pagoda_runtime.server.answers import Running, Startup

ROOT = Path(__file__).resolve().parents[2]
CRD = ROOT / "crds" / "llmservice.yaml"
JSON_TYPES = {int: "integer", str: "string", bool: "boolean", tuple: "array", dict: "object"}


def crd() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(CRD.read_text())
    return found


def schema() -> dict[str, Any]:
    (version,) = crd()["spec"]["versions"]
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]
    return found


def test_the_charts_crd_is_a_copy_byte_for_byte() -> None:
    chart = ROOT / "charts" / "pagoda"
    assert (chart / "files" / "llmservice.yaml").read_bytes() == CRD.read_bytes()
    # Helm would install it from there, once, and never upgrade it.
    assert not [*chart.glob("crds/*")]


def test_the_names_are_those_of_the_operator() -> None:
    spec = crd()["spec"]
    assert (spec["group"], spec["names"]["kind"], spec["names"]["plural"]) == (GROUP, KIND, PLURAL)
    assert [version["name"] for version in spec["versions"]] == [VERSION]


def walk(cls: type[Any], node: dict[str, Any], path: str) -> list[tuple[str, Any, Any, Any]]:
    """(path, dataclass field, its type without None, schema) of every field below a class."""
    hints = typing.get_type_hints(cls)
    names = {camel_case(f.name): f for f in fields(cls)}
    assert set(names) == set(node["properties"]), path
    assert set(node.get("required", [])) == {
        name for name, field in names.items() if default_of(field) is MISSING
    }, path
    found: list[tuple[str, Any, Any, Any]] = []
    for name, field in names.items():
        hint, inner = hints[field.name], node["properties"][name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        (first, *_) = (option for option in options if option is not type(None))
        found.append((f"{path}.{name}", field, first, inner))
        if is_dataclass(first):
            found += walk(typing.cast(type[Any], first), inner, f"{path}.{name}")
    return found


def default_of(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


FIELDS = walk(LLMServiceSpec, schema()["spec"], "spec")


@pytest.mark.parametrize(("path", "field", "kind", "node"), FIELDS, ids=[f[0] for f in FIELDS])
def test_a_field_has_one_type_one_default_and_bounds(
    path: str, field: Field[Any], kind: Any, node: dict[str, Any]
) -> None:
    default = default_of(field)
    if is_dataclass(kind):
        # An object that has defaults of its own is there even if it was left out.
        assert node["type"] == "object"
        assert ("default" in node) == is_dataclass(default)
        return
    assert node.get("default") == (None if default in (None, MISSING, (), {}) else default)
    if "type" not in node:
        assert {int, str} <= set(kind_options(path))
    elif typing.get_origin(kind) is typing.Literal:
        assert (node["type"], node["enum"]) == ("string", list(typing.get_args(kind)))
    else:
        assert node["type"] == JSON_TYPES[typing.get_origin(kind) or kind]


def kind_options(path: str) -> tuple[Any, ...]:
    """The types that the dataclass gives the field at a path."""
    cls: Any = LLMServiceSpec
    for name in path.removeprefix("spec.").split("."):
        hints = {camel_case(key): hint for key, hint in typing.get_type_hints(cls).items()}
        cls = hints[name]
    return typing.get_args(cls)


def unbounded(node: dict[str, Any], path: str) -> list[str]:
    """Paths of the schema where a value of any size would be taken."""
    found = []
    if "type" not in node:
        is_bounded = "maxLength" in node
    elif node["type"] == "object" and "properties" not in node:
        is_bounded = "maxProperties" in node
    else:
        bounds = {"string": "maxLength", "integer": "maximum", "array": "maxItems"}
        is_bounded = "enum" in node or bounds.get(node["type"], "type") in node
    if not is_bounded:
        found.append(path)
    inner = {**node.get("properties", {})}
    for key in ("items", "additionalProperties"):
        if key in node:
            inner[key] = node[key]
    for name, child in inner.items():
        found += unbounded(child, f"{path}.{name}")
    return found


def test_every_value_of_a_spec_and_of_an_engines_report_is_bounded() -> None:
    assert not unbounded(schema()["spec"], "spec")
    for name in ("model", "preflight", "rollout"):
        assert not unbounded(schema()["status"]["properties"][name], f"status.{name}")


ROLLOUT = Rollout(image="e:1", newer_image="e:2", strategy="Surge", reason="a", message="b")


def test_every_status_that_the_operator_writes_fits_the_schema() -> None:
    from datetime import UTC, datetime

    from pagoda_operator.render import render_deployment

    now, service = datetime(2026, 11, 21, tzinfo=UTC), make_service()
    deployment = render_deployment(service, engine_image="engine:1")
    body = json.dumps({"model": to_builtins(Running("LlamaForCausalLM", "awq", "int8", 2))})
    model = parse_report(body.encode())
    gpu = {"gpu": {"products": ["NVIDIA-L4"]}}
    preflight = check(make_service({"resources": gpu}).spec, read_checkpoint(LLAMA_8B, Tensors()))
    said = to_builtins(Startup("load", 43.0, 1e9, 20.0))
    load = parse_progress("pod-1", json.dumps(said).encode())
    assert load is not None
    made = make_status(
        service,
        deployment=deployment,
        cause=None,
        desired_replicas=1,
        model=model,
        preflight=preflight.fields(),
        loads=[load],
        rollout=ROLLOUT.fields(),
    )
    status = stamp(*made, {}, 1, now)
    known = schema()["status"]["properties"]
    assert set(status) == set(known)
    assert set(load) == set(known["load"]["items"]["properties"])
    assert set(model) == set(known["model"]["properties"])
    assert set(status["rollout"]) == set(known["rollout"]["properties"])
    assert known["rollout"]["properties"]["strategy"]["enum"] == list(typing.get_args(Strategy))
    assert set(status["preflight"]) == set(known["preflight"]["properties"])
    assert {"Passed", "Failed", unchecked("x")["result"]} == set(
        known["preflight"]["properties"]["result"]["enum"]
    )
    cause = Cause("InvalidSpec", "x", True)
    failed = stamp(*failed_status(cause, None, status), status, 1, now)
    for found in (status, failed):
        for condition in found["conditions"]:
            allowed = known["conditions"]["items"]["properties"]
            assert set(condition) == set(allowed)
            assert condition["status"] in allowed["status"]["enum"]


@pytest.mark.parametrize(
    "example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name
)
def test_an_example_is_an_llmservice_that_the_operator_understands(example: Path) -> None:
    document = yaml.safe_load(example.read_text())
    assert document["kind"] == KIND
    service = parse(make_manifest(document["spec"]))
    assert service.spec.min_replicas >= 1
    assert ScalingPolicy.of(service.spec) is None or service.spec.autoscaling is not None
