"""The API server refuses what is wrong, in words that help, and takes what we ship."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import stack
from api import Api, Refusal
from kube import Kubectl
from llmservices import manifest

pytestmark = pytest.mark.cluster
EXAMPLES = sorted((stack.ROOT / "examples").glob("*.yaml"))

CLAIM = {"name": "gpu", "resourceClaimTemplateName": "one-gpu"}
BAD_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "spec.model: Required value"),
    "empty uri": ({"model": {"uri": ""}}, "spec.model.uri"),
    "unknown scheme": (
        {"model": {"uri": "ftp://host/model"}},
        "model.uri has an unknown scheme; write pvc://CLAIM/PATH, hf://ORG/NAME, https://HOST/PATH,",
    ),
    "a web server with a key in its address": (
        {"model": {"uri": "https://user:key@example.com/model"}},
        "is written https://HOST/PATH, without user",
    ),
    "a web server with a query": (
        {"model": {"uri": "https://example.com/model?key=1"}},
        "is written https://HOST/PATH",
    ),
    "a revision of a web server": (
        {"model": {"uri": "https://example.com/model", "revision": "v1"}},
        "model.revision is for hf:// and oci:// models",
    ),
    "a registry with a user": (
        {"model": {"uri": "oci://me@ghcr.io/team/llama"}},
        "a model of a registry is written oci://HOST/REPOSITORY",
    ),
    "a tag and a revision": (
        {"model": {"uri": "oci://ghcr.io/team/llama:v1", "revision": "v2"}},
        "model.uri names a tag or digest itself",
    ),
    "a bucket of no name": (
        {"model": {"uri": "s3:///model"}},
        "a model of a bucket is written s3://BUCKET/PATH or gs://BUCKET/PATH",
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
    "a block of 24": ({"engine": {"blockSize": 24}}, "blockSize is 8, 16, 32, 64, 128 or 256"),
    "an alias with a space": (
        {"model": {"uri": "pvc://a/b", "aliases": ["a b"]}},
        "a name in model.aliases begins with a letter or digit and has no spaces",
    ),
    "more shared memory than memory": (
        {"resources": {"memory": "4Gi", "sharedMemory": "4Gi"}},
        "resources.sharedMemory counts in resources.memory, and is less than that",
    ),
    "no time to drain": ({"lifecycle": {"drainSeconds": 0}}, "greater than or equal to 1"),
    "a hang at once": ({"lifecycle": {"stallSeconds": 1}}, "greater than or equal to 10"),
    "the drain as a flag": (
        {"engine": {"extraArgs": ["--drain-seconds=3"]}},
        "set spec.lifecycle.drainSeconds",
    ),
    "a cache of two kinds": (
        {"cache": {"pvc": {"claimName": "a"}, "hostPath": {"path": "/a"}}},
        "cache has hostPath or pvc, not both",
    ),
    "a bound of a claim": (
        {"cache": {"pvc": {"claimName": "a"}, "sizeLimit": "5Gi"}},
        "cache.sizeLimit bounds a folder of the replica alone",
    ),
    "the node's root as a cache": (
        {"cache": {"hostPath": {"path": "/../"}}},
        "cache.hostPath.path is an absolute path below /",
    ),
    "a folder that is filled": (
        {"model": {"uri": "hf://a/b"}, "cache": {"preload": True}},
        "cache.preload fills a claim before engines start; set cache.pvc",
    ),
    "a claim that is full already": (
        {"cache": {"pvc": {"claimName": "a"}, "preload": True}},
        "cache.preload is for models that are fetched",
    ),
    "two budgets": (
        {"disruption": {"minAvailable": 1, "maxUnavailable": 1}},
        "disruption has minAvailable or maxUnavailable, not both",
    ),
    "a budget of words": (
        {"disruption": {"minAvailable": "half"}},
        "minAvailable is a number of replicas, as 1, or a percentage of them, as 50%",
    ),
    "a budget above the whole": ({"disruption": {"maxUnavailable": "101%"}}, "as 50%"),
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
    "a flag and its value in one item": (
        {"engine": {"extraArgs": ["--max-num-batched-tokens 512"]}},
        "an item of extraArgs is one argument; write a flag and its value as --flag=value",
    ),
    "an API key for all to read": (
        {"engine": {"extraArgs": ["--api-key", "secret"]}},
        "API keys come from a Secret, so that nobody reads them here; set spec.auth.apiKeysSecret",
    ),
    "a revision as a flag": (
        {"engine": {"extraArgs": ["--revision=main"]}},
        "extraArgs repeats a flag that has a field of its own",
    ),
    "a revision of a claim": (
        {"model": {"uri": "pvc://models/a", "revision": "main"}},
        "model.revision is for hf:// and oci:// models",
    ),
    "credentials for a claim": (
        {"model": {"uri": "pvc://models/a", "credentialsSecretRef": {"name": "hub"}}},
        "model.credentialsSecretRef is for models that are fetched",
    ),
    "a secret without a name": (
        {"auth": {"apiKeysSecretRef": {}}},
        "spec.auth.apiKeysSecretRef.name: Required value",
    ),
    "negative cpu": ({"resources": {"cpu": -2}}, "should be greater than 0"),
    "no cpu at all": ({"resources": {"cpu": 0}}, "should be greater than 0"),
    "cpu of nonsense": ({"resources": {"cpu": "half"}}, "spec.resources.cpu in body should match"),
    "cpu as a list": (
        {"resources": {"cpu": [1]}},
        "spec.resources.cpu: Too many: 1",
    ),
    "cpu as a truth": ({"resources": {"cpu": True}}, "spec.resources.cpu"),
    "more memory requested than may be used": (
        {"resources": {"memory": "4Gi", "memoryRequest": "5Gi"}},
        "resources.memoryRequest may not exceed resources.memory",
    ),
    "a cache without unit": (
        {"cache": {"sizeLimit": 200}},
        "cache.sizeLimit is at least 1Mi, with its unit",
    ),
    "memory without unit": ({"resources": {"memory": 16}}, "with its unit, as 16Gi"),
    "memory of nonsense": ({"resources": {"memory": "16x"}}, "with its unit, as 16Gi"),
    "GPU name without domain": (
        {"resources": {"gpu": {"resourceName": "gpu"}}},
        "resourceName is a domain, '/' and a name",
    ),
    "products for a CPU": (
        {"resources": {"gpu": {"count": 0, "products": ["NVIDIA-L4"]}}},
        "resources.gpu.products is for engines on GPUs; remove it, or set resources.gpu.count",
    ),
    "products of others": (
        {"resources": {"gpu": {"resourceName": "amd.com/gpu", "products": ["MI300X"]}}},
        "resources.gpu.products are NVIDIA's; for other GPUs set podTemplate.nodeSelector",
    ),
    "a product with spaces": (
        {"resources": {"gpu": {"products": ["NVIDIA L4"]}}},
        "a product is the value of a node's label nvidia.com/gpu.product",
    ),
    "a product twice": (
        {"resources": {"gpu": {"products": ["NVIDIA-L4", "NVIDIA-L4"]}}},
        "Duplicate value",
    ),
    "GPUs by claims and by number": (
        {"resources": {"gpu": {"count": 1, "claims": [CLAIM]}}},
        "resources.gpu.claims say which GPUs and how many; remove count, products and resourceName",
    ),
    "a claim of nothing": (
        {"resources": {"gpu": {"claims": [{"name": "gpu"}]}}},
        "spec.resources.gpu.claims[0].resourceClaimTemplateName: Required value",
    ),
    "a queue with a space": (
        {"resources": {"queueName": "a b"}},
        "queueName is the name of a LocalQueue of Kueue",
    ),
    "nine products": (
        {"resources": {"gpu": {"products": [f"NVIDIA-{number}" for number in range(9)]}}},
        "must have at most 8 items",
    ),
    "a peer of nothing": (
        {"networkPolicy": {"enabled": True, "from": [{}]}},
        "should have at least 1 properties",
    ),
    "unknown field": ({"engine": {"blocks": 16}}, 'unknown field "spec.engine.blocks"'),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_a_bad_spec_is_refused_in_words_that_help(api: Api, case: str) -> None:
    spec, words = BAD_SPECS[case]
    with pytest.raises(Refusal) as refusal:
        api.create(manifest(spec), is_dry_run=True)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("a" * 51, "at most 50 characters"), ("7b", "begins with a letter"), ("a.b", "lower case")],
)
def test_a_bad_name_is_refused_in_words_that_help(api: Api, name: str, words: str) -> None:
    with pytest.raises(Refusal) as refusal:
        api.create(manifest({}, name=name), is_dry_run=True)
    assert words in str(refusal.value)


def test_the_longest_name_and_an_engine_on_the_cpu_with_any_tp_are_taken(
    api: Api,
) -> None:
    spec = {"engine": {"tensorParallelSize": 8}, "resources": {"gpu": {"count": 0}}}
    assert api.create(manifest(spec, name="a" * 50), is_dry_run=True)


@pytest.mark.parametrize("cpu", [2, 0.5, 0.001, "250m", "1.5", "16"])
def test_cores_are_numbers_or_quantities(api: Api, cpu: float | str) -> None:
    assert api.create(manifest({"resources": {"cpu": cpu}}), is_dry_run=True)


@pytest.mark.parametrize(
    "arguments",
    [["--seed=7"], ["--seed", "7"], ["--chat-template=/a b.jinja"], ["--chat-template", "/a b"]],
    ids=str,
)
def test_an_extra_argument_may_have_a_space_in_its_value(api: Api, arguments: list[str]) -> None:
    assert api.create(manifest({"engine": {"extraArgs": arguments}}), is_dry_run=True)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_taken(target: stack.Target, crds: None, example: Path) -> None:
    flags = ("--dry-run=server", "--validate=strict")
    assert "dry run" in target.kubectl.run("apply", *flags, "-f", str(example))


@pytest.mark.parametrize("is_namespaced", [False, True], ids=["cluster-wide", "namespaced"])
def test_the_rendered_chart_is_taken(
    target: stack.Target, namespace: Kubectl, is_namespaced: bool
) -> None:
    watched = namespace.namespace if is_namespaced else ""
    command = [target.helm, "template", "pagoda", str(stack.CHART)]
    command += ["--namespace", namespace.namespace, "--set", f"watchNamespace={watched}"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    flags = ("--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")
    answer = namespace.run("apply", *flags, "-f", "-", stdin=rendered)
    assert "deployment.apps/pagoda-operator" in answer
    assert "customresourcedefinition" in answer
    assert ("clusterrole." in answer) is not is_namespaced
