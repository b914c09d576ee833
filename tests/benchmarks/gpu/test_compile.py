"""A sample of `make gpu-compile`: kernels of one engine, for every kind of GPU."""

from __future__ import annotations

import json

import pytest
from gpu.compilation import TARGETS
from gpu.compile import collect, collect_products, compile_for, faults_of, write


@pytest.fixture(scope="module")
def kernels():
    return list(collect(["qwen3-0.6b"], ["fp8_e4m3"], [16]).values())


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_an_engines_kernels_compile_without_a_fault(kernels, target):
    # All of them for Hopper, and of the others one of each kernel.
    one_of_each = {kernel.specialisation.kernel: kernel for kernel in kernels}.values()
    for kernel in kernels if target == "90" else one_of_each:
        kernel.compiled[target] = compile_for(target, kernel.specialisation)
    assert list(faults_of(kernels)) == []


@pytest.mark.slow
def test_products_with_quantized_matrices_compile_without_a_fault():
    kernels = list(collect_products().values())
    for kernel in kernels:
        kernel.compiled["90"] = compile_for("90", kernel.specialisation)
    assert list(faults_of(kernels)) == []
    names = {kernel.specialisation.kernel for kernel in kernels}
    assert names == {
        "product_kernel",
        "widen_kernel",
        "round_kernel",
        "scaled_product_kernel",
        "add_splits_kernel",
        # Where steps are not split.
        "_gated_activation_kernel",
    }


def test_products_of_e4m3_are_compiled_for_gpus_that_have_them():
    assert [name for name, target in TARGETS.items() if target.multiplies_e4m3] == [
        "89",
        "90",
        "100",
    ]
    made = {kernel.specialisation.has_e4m3 for kernel in collect_products().values()}
    assert made == {False, True}


@pytest.mark.slow
def test_the_table_has_a_kernel_a_line(kernels, tmp_path):
    for kernel in kernels[:2]:
        kernel.compiled["90"] = compile_for("90", kernel.specialisation)
    write(tmp_path / "table.json", kernels, 1.0)
    table = json.loads((tmp_path / "table.json").read_text())
    assert len(table["kernels"]) == len(kernels)
    first = table["kernels"][0]
    assert first["used_by"] == {"qwen3-0.6b": ["fp8_e4m3 16"]}
    columns = dict(zip(table["columns"], first["targets"]["90"], strict=True))
    assert columns["spilled_bytes"] == 0
    assert columns["registers"] > 0


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_a_fault_like_others(kernels):
    kernel = kernels[0]
    broken = kernel.specialisation._replace(args=())
    (fault,) = compile_for("90", broken).faults
    assert fault.startswith("does not compile: ")
