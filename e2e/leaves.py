"""Every leaf of a CRD's schema, and values for it: those it takes, those it refuses, and odd ones.

All is read from the schema. The tables here say what no schema does: words of a form, and what a
field needs beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import yaml

Node = Mapping[str, Any]
Path = tuple[str, ...]
ITEM, ENTRY = "[]", "{}"
"""Steps of a path: into a list, and into a map of any keys."""

WORDS: dict[str, tuple[str, ...]] = {
    "model.uri": (
        "pvc://models/b",
        "hf://org/b",
        "https://host.example/b",
        "s3://bucket/b",
        "gs://bucket/b",
        "oci://registry.example/team/b:v1",
    ),
    "model.revision": ("v1", "refs/pr/1"),
    "engine.image": ("engine:2", "registry.example:5000/engine@sha256:" + "0" * 64),
    "extraArgs.[]": ("--seed=7", "--seed"),
    "gpu.resourceName": ("nvidia.com/mig-3g.40gb", "amd.com/gpu"),
    "cpu": ("500m", "1.5"),
    "cpuLimit": ("500m", "1.5"),
    "memory": ("16Gi", "0.5Ti"),
    "memoryRequest": ("8Gi", "9G"),
    "minAvailable": ("50%", "100%"),
    "maxUnavailable": ("0%", "25%"),
    "hostPath.path": ("/var/cache/pagoda", "/srv/a.b"),
    "cidr": ("10.0.0.0/8", "2001:db8::/32"),
    "except.[]": ("10.1.0.0/16", "10.2.0.0/16"),
    "fieldPath": ("status.podIP", "metadata.labels['a']"),
    "env.[].name": ("A", "_b.c-d"),
    "envFrom.[].prefix": ("A_", ""),
    "matchFields.[].key": ("metadata.name",),
    "mountPath": ("/data", "/srv/a.b"),
    "tolerations.[].value": ("a", ""),
}
QUANTITIES = ("5Gi", "5000M")
OTHER_WORDS = ("a", "b1")
NEEDS: dict[str, dict[str, Any]] = {
    "model.revision": {"model": {"uri": "hf://org/b"}},
    "model.credentialsSecretRef": {"model": {"uri": "hf://org/b"}},
    "cache.preload": {"model": {"uri": "hf://org/b"}, "cache": {"pvc": {"claimName": "a"}}},
    "networkPolicy.from": {"networkPolicy": {"enabled": True}},
    "autoscaling": {"observability": {"prometheusRule": True}},
    "autoscaling.minReplicas": {"autoscaling": {"maxReplicas": 1000}},
    "resources.gpu.count": {"engine": {"tensorParallelSize": 16}},
    "resources.memoryRequest": {"resources": {"memory": "16Gi"}},
    "podTemplate.volumeMounts": {
        "podTemplate": {
            "volumes": [{"name": name, "secret": {"secretName": "a"}} for name in OTHER_WORDS]
        }
    },
}
"""What the spec needs elsewhere, by the beginning of a path."""
BESIDE: dict[str, dict[str, Any]] = {
    "except": {"cidr": "10.0.0.0/8"},
    "minDomains": {"whenUnsatisfiable": "DoNotSchedule"},
    "tolerationSeconds": {"effect": "NoExecute", "key": "a"},
    "tolerations.[].value": {"key": "a"},
    "tolerations.[].effect": {"key": "a"},
    "env.[].name": {"value": "x"},
    "envFrom.[].prefix": {"secretRef": {"name": "a"}},
    "volumes.[].name": {"secret": {"secretName": "a"}},
    "matchFields.[].key": {"values": ["a"]},
    "matchExpressions.[].key": {"values": ["a"]},
}
"""What a leaf needs in its own object, by the end of its path."""
SEEN_BY_EFFECT = (
    "autoscaling.driver",
    "autoscaling.minReplicas",
    "autoscaling.scaleDown.stabilizationSeconds",
    "suspend",
    "engine.imagePolicy",
)
"""Leaves that no child shows but by how many replicas there are, or when their image changes."""
ODD_WORDS = (
    "",
    " ",
    "-",
    "A_",
    "鑑🏯",
    "a\n",
    "\x00",
    "../a",
    "..a",
    "a..b",
    "a/b/c",
    "$(HOME)",
    "a" * 64,
)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One field whose value is no object with fields of its own."""

    path: Path
    node: Node

    def __str__(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True, slots=True)
class Mutation:
    """A value of a leaf, in the least spec that has it.

    is_valid: whether the schema takes it; None where that is for the API server to say.
    """

    leaf: Leaf
    value: Any
    spec: dict[str, Any]
    is_valid: bool | None

    def __str__(self) -> str:
        return f"{self.leaf} = {self.value!r:.60}"


def load_schema(crd: FilePath) -> Node:
    """The schema of `spec` in a file of a CRD."""
    (version,) = yaml.safe_load(crd.read_text())["spec"]["versions"]
    found: Node = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return found


def find_leaves(node: Node, path: Path = ()) -> Iterator[Leaf]:
    """The leaves below a node, in the schema's order."""
    if "properties" in node:
        for name, inner in node["properties"].items():
            yield from find_leaves(inner, (*path, name))
    elif node.get("type") == "array":
        yield from find_leaves(node["items"], (*path, ITEM))
    elif "additionalProperties" in node:
        yield from find_leaves(node["additionalProperties"], (*path, ENTRY))
    else:
        yield Leaf(path, node)


def mutate(root: Node) -> Iterator[Mutation]:
    """Every mutation of a schema; what it has in several places by an anchor, in the first one."""
    seen: set[int] = set()
    yield from _mutate(root, root, (), seen)


def accept(root: Node, leaf: Leaf) -> Iterator[Mutation]:
    """Values of a leaf that are taken, in the least specs that have them."""
    for value in valid_values(leaf.path, leaf.node):
        yield Mutation(leaf, value, place(root, leaf.path, value), True)


def _mutate(root: Node, node: Node, path: Path, seen: set[int]) -> Iterator[Mutation]:
    if "properties" in node:
        if id(node) in seen:
            return
        seen.add(id(node))
        yield from _mutate_object(root, node, path)
        for name, inner in node["properties"].items():
            yield from _mutate(root, inner, (*path, name), seen)
    elif node.get("type") == "array":
        yield from _mutate_array(root, node, path)
        yield from _mutate(root, node["items"], (*path, ITEM), seen)
    elif "additionalProperties" in node:
        yield from _mutate_map(root, node, path)
        yield from _mutate(root, node["additionalProperties"], (*path, ENTRY), seen)
    else:
        yield from _mutate_leaf(root, Leaf(path, node))


def _mutate_leaf(root: Node, leaf: Leaf) -> Iterator[Mutation]:
    yield from accept(root, leaf)
    for value in _invalid_values(leaf.node):
        yield Mutation(leaf, value, place(root, leaf.path, value), False)
    if _takes_words(leaf.node):
        for word in (*ODD_WORDS, "a" * leaf.node.get("maxLength", 0)):
            yield Mutation(leaf, word, place(root, leaf.path, word), None)
    yield Mutation(leaf, None, place(root, leaf.path, None), None)


def _mutate_object(root: Node, node: Node, path: Path) -> Iterator[Mutation]:
    here, whole = Leaf(path, node), least(node, path)
    wrong = [{**whole, "noSuchField": 1}, *(_of_other_type("object") if path else ())]
    for name in node.get("required", []):
        wrong.append({key: value for key, value in whole.items() if key != name})
    for value in wrong:
        yield Mutation(here, value, place(root, path, value), False)


def _mutate_array(root: Node, node: Node, path: Path) -> Iterator[Mutation]:
    item = least(node["items"], (*path, ITEM))
    wrong = [[_numbered(item, number) for number in range(node["maxItems"] + 1)], [None]]
    wrong += _of_other_type("array")
    if node.get("x-kubernetes-list-type") in ("set", "map"):
        wrong.append([item, item])
    for value in wrong:
        yield Mutation(Leaf(path, node), value, place(root, path, value), False)


def _mutate_map(root: Node, node: Node, path: Path) -> Iterator[Mutation]:
    here = Leaf(path, node)
    too_many = {f"a{number}": "a" for number in range(node["maxProperties"] + 1)}
    for value in [too_many, *_of_other_type("object")]:
        yield Mutation(here, value, place(root, path, value), False)
    for word in ODD_WORDS:
        yield Mutation(here, {word: "a"}, place(root, path, {word: "a"}), None)


def place(root: Node, path: Path, value: Any) -> dict[str, Any]:
    """The least spec in which the path has the value."""
    spec: dict[str, Any] = _place(root, path, value, ())
    for start, needed in NEEDS.items():
        if ".".join(path).startswith(start):
            spec = merge(spec, needed)
    return spec


def merge(first: Any, second: Any) -> Any:
    """Both; what `second` says comes before what `first` says. Lists are merged by their heads."""
    if isinstance(first, dict) and isinstance(second, dict):
        both = {**first, **second}
        return both | {key: merge(first[key], second[key]) for key in first.keys() & second.keys()}
    if isinstance(first, list) and isinstance(second, list) and first and second:
        return [merge(first[0], second[0]), *second[1:]]
    return second


def least(node: Node, path: Path) -> Any:
    """The least value that the schema takes."""
    if "properties" in node:
        properties = node["properties"]
        return {name: least(properties[name], (*path, name)) for name in node.get("required", [])}
    if node.get("type") == "array":
        return [least(node["items"], (*path, ITEM))] * node.get("minItems", 0)
    if "additionalProperties" in node:
        return {}
    return next(valid_values(path, node))


def valid_values(path: Path, node: Node) -> Iterator[Any]:
    """Values of a leaf that are taken, and do not mean the same."""
    if "enum" in node:
        yield from node["enum"]
    elif node.get("type") == "integer":
        yield from (node["minimum"], node["maximum"])
    elif node.get("type") == "boolean":
        yield from (True, False)
    else:
        is_quantity = node.get("x-kubernetes-int-or-string")
        yield from _by_end(WORDS, path) or (QUANTITIES if is_quantity else OTHER_WORDS)


def _place(node: Node, path: Path, value: Any, here: Path) -> Any:
    if not path:
        return value
    step, rest = path[0], path[1:]
    if step == ITEM:
        return [_place(node["items"], rest, value, (*here, ITEM))]
    if step == ENTRY:
        return {"a": _place(node["additionalProperties"], rest, value, (*here, ENTRY))}
    found = merge(least(node, here), _by_end(BESIDE, (*here, step)) or {})
    if step == "operator":
        found |= _beside_operator(here, value)
    elif "[]" in here[-1:] and here[-2:-1] == ("volumes",) and step != "name":
        found.pop("secret", None)
    inner = _place(node["properties"][step], rest, value, (*here, step))
    return {**found, step: inner}


def _beside_operator(here: Path, operator: Any) -> dict[str, Any]:
    if "tolerations" in here:
        return {"key": "a"}
    values = {"In": ["a"], "NotIn": ["a"], "Gt": ["1"], "Lt": ["1"]}
    found = values.get(operator) if isinstance(operator, str) else None
    return {"values": found} if found else {}


def _by_end(table: Mapping[str, Any], path: Path) -> Any:
    text = f".{'.'.join(path)}"
    return next((found for end, found in table.items() if text.endswith(f".{end}")), None)


def _takes_words(node: Node) -> bool:
    return "enum" not in node and ("maxLength" in node or node.get("type") == "string")


def _invalid_values(node: Node) -> Iterator[Any]:
    if "enum" in node:
        yield "NoSuchWord"
    if node.get("type") == "integer":
        yield from (node["minimum"] - 1, node["maximum"] + 1, node["minimum"] + 0.5, 10**30)
    if "maxLength" in node:
        yield "a" * (node["maxLength"] + 1)
    if node.get("minLength", 0) > 0:
        yield ""
    if node.get("x-kubernetes-int-or-string"):
        yield from (-1, 1.5, 10**30, "1x", [], {}, [1], {"a": 1}, True)
    elif "type" not in node:
        yield from (-1, 0, 10**30, "1x", [], {}, [1], {"a": 1}, True, False)
    else:
        yield from _of_other_type(node["type"])


def _of_other_type(kind: str) -> list[Any]:
    values = {"string": "a", "integer": 1, "array": [1], "object": {"a": 1}}
    return [value for name, value in values.items() if name != kind]


def _numbered(item: Any, number: int) -> Any:
    """The item as the only one of its name in a list."""
    if isinstance(item, str):
        return f"a{number}"
    if not isinstance(item, dict):
        return number + 1
    return {
        key: f"{it}{number}" if key in ("name", "mountPath") else it for key, it in item.items()
    }


def combine(root: Node, is_taken: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Few specs without replicas that have, together, every leaf."""
    found: list[dict[str, Any]] = []
    for leaf in find_leaves(root):
        # The last value: the first one is often the default.
        *_, last = accept(root, leaf)
        for index, spec in enumerate(found):
            both = merge(spec, {**last.spec, "suspend": True})
            if is_taken(both):
                found[index] = both
                break
        else:
            found.append({**last.spec, "suspend": True})
    return found
