"""The API server refuses what is wrong, in words that help, and takes what we ship."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import stack
import yaml
from kube import Kubectl, KubectlError

pytestmark = pytest.mark.cluster
EXAMPLES = sorted((stack.ROOT / "examples").glob("*.yaml"))

BAD_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "spec.model: Required value"),
    "empty uri": ({"model": {"uri": ""}}, "spec.model.uri"),
    "unknown scheme": (
        {"model": {"uri": "s3://bucket/model"}},
        "model.uri has an unknown scheme; write pvc://CLAIM/PATH or hf://ORG/NAME",
    ),
    "hf without organisation": ({"model": {"uri": "hf://gemma"}}, "is written hf://ORG/NAME"),
    "pvc path upwards": ({"model": {"uri": "pvc://a/../b"}}, "no part of PATH begins with '.'"),
    "model name with a space": (
        {"model": {"uri": "pvc://a/b", "name": "my model"}},
        "model.name begins with a letter or digit and has no spaces",
    ),
    "min above max": (
        {"autoscaling": {"minReplicas": 3, "maxReplicas": 2}},
        "minReplicas may not exceed maxReplicas",
    ),
    "no max": ({"autoscaling": {}}, "spec.autoscaling.maxReplicas: Required value"),
    "zero max": ({"autoscaling": {"maxReplicas": 0}}, "greater than or equal to 1"),
    "negative replicas": ({"replicas": -1}, "greater than or equal to 0"),
    "negative window": (
        {"autoscaling": {"maxReplicas": 2, "scaleDown": {"stabilizationSeconds": -1}}},
        "greater than or equal to 0",
    ),
    "unknown quantization": (
        {"engine": {"quantization": "awq"}},
        'Unsupported value: "awq": supported values: "Auto", "None", "AWQ"',
    ),
    "unknown KV dtype": ({"engine": {"kvCacheDtype": "FP4"}}, 'Unsupported value: "FP4"'),
    "unknown dtype": ({"engine": {"dtype": "bf16"}}, 'Unsupported value: "bf16"'),
    "TP 5": ({"engine": {"tensorParallelSize": 5}}, "is 1, 2, 3, 4, 6, 8 or 16"),
    "TP 0": ({"engine": {"tensorParallelSize": 0}}, "greater than or equal to 1"),
    "negative context": ({"engine": {"maxModelLen": -8}}, "greater than or equal to 2"),
    "all of the GPU": ({"engine": {"gpuMemoryPercent": 100}}, "less than or equal to 98"),
    "a string for a number": ({"engine": {"maxNumSeqs": "16"}}, "must be of type integer"),
    "a typed flag again": (
        {"engine": {"extraArgs": ["--max-num-seqs=3"]}},
        "extraArgs repeats a flag that has a field of its own",
    ),
    "a flag of the operator": (
        {"engine": {"extraArgs": ["--port", "80"]}},
        "extraArgs has a flag that the operator sets itself",
    ),
    "fewer GPUs than TP": (
        {"engine": {"tensorParallelSize": 4}, "resources": {"gpu": {"count": 2}}},
        "resources.gpu.count is 0 (an engine on the CPU) or equal to engine.tensorParallelSize",
    ),
    "negative cpu": ({"resources": {"cpu": -2}}, "cpu is a positive number of cores"),
    "memory without unit": ({"resources": {"memory": 16}}, "with its unit, as 16Gi"),
    "memory of nonsense": ({"resources": {"memory": "16x"}}, "with its unit, as 16Gi"),
    "GPU name without domain": (
        {"resources": {"gpu": {"resourceName": "gpu"}}},
        "resourceName is a domain, '/' and a name",
    ),
    "unknown field": ({"engine": {"blockSize": 16}}, 'unknown field "spec.engine.blockSize"'),
}


def manifest(spec: dict[str, Any], name: str = "x") -> dict[str, Any]:
    merged = {"model": {"uri": "pvc://models/a"}, **spec}
    return {
        "apiVersion": "pagoda.dev/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": name},
        "spec": {key: value for key, value in merged.items() if value is not None},
    }


def dry_run(kubectl: Kubectl, document: object) -> str:
    flags = ("--dry-run=server", "--validate=strict")
    return kubectl.run("create", *flags, "-f", "-", stdin=yaml.safe_dump(document))


@pytest.mark.parametrize("case", BAD_SPECS)
def test_a_bad_spec_is_refused_in_words_that_help(namespace: Kubectl, case: str) -> None:
    spec, words = BAD_SPECS[case]
    with pytest.raises(KubectlError) as refusal:
        dry_run(namespace, manifest(spec))
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("a" * 51, "at most 50 characters"), ("7b", "begins with a letter"), ("a.b", "lower case")],
)
def test_a_bad_name_is_refused_in_words_that_help(
    namespace: Kubectl, name: str, words: str
) -> None:
    with pytest.raises(KubectlError) as refusal:
        dry_run(namespace, manifest({}, name=name))
    assert words in str(refusal.value)


def test_the_longest_name_and_an_engine_on_the_cpu_with_any_tp_are_taken(
    namespace: Kubectl,
) -> None:
    spec = {"engine": {"tensorParallelSize": 8}, "resources": {"gpu": {"count": 0}}}
    assert "created" in dry_run(namespace, manifest(spec, name="a" * 50))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_taken(namespace: Kubectl, example: Path) -> None:
    flags = ("--dry-run=server", "--validate=strict")
    assert "dry run" in namespace.run("apply", *flags, "-f", str(example))


@pytest.mark.parametrize("is_namespaced", [False, True], ids=["cluster-wide", "namespaced"])
def test_the_rendered_chart_is_taken(
    target: stack.Target, namespace: Kubectl, is_namespaced: bool
) -> None:
    watched = namespace.namespace if is_namespaced else ""
    command = [target.helm, "template", "pagoda", str(stack.CHART), "--include-crds"]
    command += ["--namespace", namespace.namespace, "--set", f"watchNamespace={watched}"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    flags = ("--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")
    answer = namespace.run("apply", *flags, "-f", "-", stdin=rendered)
    assert "deployment.apps/pagoda-operator" in answer
    assert "customresourcedefinition" in answer
    assert ("clusterrole." in answer) is not is_namespaced
