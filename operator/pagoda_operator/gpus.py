"""How much memory a GPU has, from the names that Kubernetes knows it by. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pagoda_operator.pod import PRODUCT_LABEL
from pagoda_operator.spec import LLMServiceSpec

GIB = 2**30
PRODUCTS: Mapping[str, float] = {
    "NVIDIA-L4": 22.0,
    "NVIDIA-A10": 22.0,
    "NVIDIA-A10G": 22.0,
    "NVIDIA-GeForce-RTX-4090": 23.5,
    "NVIDIA-A30": 23.5,
    "NVIDIA-A100-SXM4-40GB": 39.3,
    "NVIDIA-A100-PCIE-40GB": 39.3,
    "NVIDIA-L40": 44.3,
    "NVIDIA-L40S": 44.3,
    "NVIDIA-A40": 44.3,
    "NVIDIA-RTX-A6000": 47.4,
    "NVIDIA-A100-SXM4-80GB": 79.1,
    "NVIDIA-A100-80GB-PCIe": 79.1,
    "NVIDIA-H100-80GB-HBM3": 79.1,
    "NVIDIA-H100-PCIe": 79.1,
    "NVIDIA-H100-NVL": 93.0,
    "NVIDIA-GH200-480GB": 94.4,
    "NVIDIA-H200": 139.7,
    "NVIDIA-B200": 178.3,
}
"""nvidia.com/gpu.product → GiB that CUDA sees of it, rounded down, smallest first. Read from a card
for the H100; of the others it is what they are sold with, less some that the driver keeps."""
# A slice by MIG names its memory, in products and in resources: 1g.10gb.
_SLICE = re.compile(r"\d+g\.(\d+)gb")
# The driver keeps some of it.
_SLICE_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class GpuMemory:
    name: str
    total_bytes: int


def find_gpu(spec: LLMServiceSpec) -> GpuMemory | None:
    """The GPU that is asked for, of several the one with the least memory; None: not known."""
    names = named_products(spec) or (spec.resources.gpu.resource_name,)
    known = [found for found in map(memory_of, names) if found is not None]
    return min(known, key=lambda found: found.total_bytes) if len(known) == len(names) else None


def named_products(spec: LLMServiceSpec) -> tuple[str, ...]:
    """By a field of their own, or as a label that the nodes have to have."""
    label = spec.pod_template.node_selector.get(PRODUCT_LABEL)
    return (str(label),) if label is not None else spec.resources.gpu.products


def memory_of(name: str) -> GpuMemory | None:
    """Of a product, or of a resource that is a slice."""
    if (found := _SLICE.search(name)) is not None:
        return GpuMemory(name, int(int(found[1]) * _SLICE_SHARE * GIB))
    # Shared by time, pods have all of its memory.
    gib = PRODUCTS.get(name.removesuffix("-SHARED"))
    return None if gib is None else GpuMemory(name, int(gib * GIB))
