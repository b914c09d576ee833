"""Kernels compiled for GPUs that are not there: what passes, and what every rule finds."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from gpu.compilation import TARGETS, examine, specialise

from pagoda_kernels.launch import LaunchRecorder, launch


@triton.jit
def product(a_ptr, b_ptr, out_ptr, num_rows, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    rows, depth, columns = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, 64)
    a = tl.load(a_ptr + rows[:, None] * DEPTH + depth, rows[:, None] < num_rows, 0.0)
    b = tl.load(b_ptr + depth[:, None] * 64 + columns)
    tl.store(out_ptr + rows[:, None] * 64 + columns, tl.dot(a, b).to(a.dtype))


@triton.jit
def crowded(x_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    first, second = tl.load(x_ptr + places), tl.load(x_ptr + SIZE + places)
    # Both are needed afterwards, so they have to be somewhere.
    factor = tl.sum(first * second)
    tl.store(x_ptr + places, first * factor)
    tl.store(x_ptr + SIZE + places, second * factor)


def compile_launches(make_launches, target):
    with LaunchRecorder() as recorder:
        make_launches()
    made = specialise(recorder.launches, TARGETS[target]).values()
    return [examine(one.compile(TARGETS[target]), TARGETS[target]) for one in made]


def launch_product(rows=64, depth=128, num_rows=(50,), dtype=torch.bfloat16, **options):
    x = torch.empty(1 << 16, dtype=dtype, device="cuda")
    for number in num_rows:
        launch(product, [1], x, x, x, number, ROWS=rows, DEPTH=depth, **options)


@pytest.mark.parametrize(
    ("target", "rows", "dot"),
    [
        ("80", 64, "mma.sync"),
        ("90", 64, "wgmma"),
        ("90", 16, "mma.sync"),
        ("100", 64, "tcgen05.mma"),
        ("gfx942", 64, "v_mfma"),
    ],
)
def test_a_product_uses_the_tensor_cores_of_every_target(target, rows, dot):
    (compiled,) = compile_launches(lambda: launch_product(rows=rows), target)
    assert compiled.faults == ()
    assert compiled.dots == (dot,)
    assert compiled.registers > 0
    assert compiled.num_warps == 4


def test_launches_that_triton_compiles_once_are_compiled_once():
    with LaunchRecorder() as recorder:
        # A number is 1, a multiple of 16, or any other.
        launch_product(num_rows=(1, 17, 33, 50, 16, 32))
        launch_product(num_rows=(17,), num_warps=8)
    made = list(specialise(recorder.launches, TARGETS["90"]).values())
    assert [one.signature for one in made] == [
        "*bf16, *bf16, *bf16",
        *["*bf16, *bf16, *bf16, i32"] * 3,
    ]
    assert [one.options.get("num_warps") for one in made] == [None, None, None, 8]
    assert made[0].constants == {"ROWS": "64", "DEPTH": "128"}


def test_an_address_that_is_not_aligned_is_another_specialisation():
    with LaunchRecorder() as recorder:
        x = torch.empty(1 << 16, dtype=torch.bfloat16, device="cuda")
        for start in (0, 1, 8, 9):
            launch(product, [1], x[start:], x, x, 17, ROWS=16, DEPTH=32)
    assert len(specialise(recorder.launches, TARGETS["90"])) == 2


def test_shared_memory_over_a_targets_limit_is_a_fault():
    (compiled,) = compile_launches(lambda: launch_product(rows=128, depth=512), "gfx942")
    (fault,) = compiled.faults
    assert fault.startswith(f"takes {compiled.shared_bytes} bytes of shared memory")
    assert fault.endswith("a block may take 65536")


def test_a_product_without_the_targets_own_instruction_is_a_fault():
    with LaunchRecorder() as recorder:
        launch_product()
    (made,) = specialise(recorder.launches, TARGETS["90"]).values()
    compiled = examine(made.compile(TARGETS["90"]), TARGETS["89"])
    assert compiled.faults == ("multiplies by wgmma, not mma.sync",)


def test_two_warps_are_too_few_for_hoppers_own_instruction():
    (compiled,) = compile_launches(lambda: launch_product(num_warps=2), "90")
    assert compiled.dots == ("mma.sync",)
    assert compiled.faults == ()


@pytest.mark.parametrize(("target", "size"), [("90", 4096), ("gfx942", 16384)])
def test_registers_that_do_not_suffice_are_a_fault(target, size):
    def launch_crowded():
        launch(crowded, [1], torch.empty(1 << 16, device="cuda"), SIZE=size, num_warps=1)

    (compiled,) = compile_launches(launch_crowded, target)
    assert compiled.spilled_bytes > 0
    assert compiled.faults == (f"spills {compiled.spilled_bytes} bytes of registers",)
