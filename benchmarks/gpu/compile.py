"""Compile every kernel that the engine would launch, for GPUs that are not there.

    python -m gpu.compile --out FILE [--shapes [NAME …]] [--no-products] [--targets NAME …]

Fails on a kernel that does not compile, spills registers, takes more shared memory than a block
may, or multiplies without the tensor cores' own instructions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from report import current_commit

from gpu.compilation import TARGETS, Compiled, Specialisation, examine, specialise
from gpu.recording import BLOCK_SIZES, KV_DTYPES, record, record_products
from gpu.shapes import SHAPES
from pagoda_kernels.launch import Launch

PRODUCTS = "products"
COLUMNS = ("registers", "spilled_bytes", "shared_bytes", "num_warps", "dots")


@dataclass(slots=True)
class Kernel:
    """One that is compiled for some targets, and the engines that launch it."""

    specialisation: Specialisation
    used_by: dict[str, list[str]] = field(default_factory=dict)
    """Shape → KV dtype and block size; PRODUCTS → matrices."""
    compiled: dict[str, Compiled] = field(default_factory=dict)
    """By target."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "kernel": self.specialisation.kernel,
            "constants": self.specialisation.constants,
            "arguments": self.specialisation.signature,
            "used_by": self.used_by,
            "targets": {
                name: [getattr(compiled, column) for column in COLUMNS]
                for name, compiled in self.compiled.items()
            },
        }


def collect(
    shapes: Iterable[str], kv_dtypes: Sequence[str], block_sizes: Sequence[int]
) -> dict[str, Kernel]:
    """What engines of these shapes launch, by Triton's key."""
    kernels: dict[str, Kernel] = {}
    for shape in shapes:
        for kv_dtype, block_size, launches in record(shape, kv_dtypes, block_sizes):
            add_launches(kernels, shape, f"{kv_dtype} {block_size}", launches)
    return kernels


def collect_products() -> dict[str, Kernel]:
    """What products with quantized matrices launch."""
    kernels: dict[str, Kernel] = {}
    for matrix, launches in record_products():
        add_launches(kernels, PRODUCTS, matrix, launches)
    return kernels


def add_launches(
    kernels: dict[str, Kernel], user: str, variant: str, launches: Iterable[Launch]
) -> None:
    """Note who launches them."""
    # No target changes what is launched.
    target = next(iter(TARGETS.values()))
    for key, specialisation in specialise(launches, target).items():
        kernel = kernels.setdefault(key, Kernel(specialisation))
        kernel.used_by.setdefault(user, []).append(variant)


def compile_for(target: str, specialisation: Specialisation) -> Compiled:
    """Compile and examine one kernel."""
    try:
        return examine(specialisation.compile(TARGETS[target]), TARGETS[target])
    except Exception as error:
        # Any at all: the others are compiled, and all faults are told.
        return Compiled(0, 0, 0, 0, (), (f"does not compile: {error}",))


def compile_all(kernels: Iterable[Kernel], targets: Sequence[str], num_processes: int) -> None:
    """Fill in `compiled` of each."""
    wanted = [
        (target, kernel)
        for target, kernel in itertools.product(targets, kernels)
        if TARGETS[target].multiplies_e4m3 or not kernel.specialisation.has_e4m3
    ]
    # Not forked: torch's threads would be missing.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context) as pool:
        results = pool.map(
            compile_for,
            [target for target, _ in wanted],
            [kernel.specialisation for _, kernel in wanted],
        )
        for number, ((target, kernel), compiled) in enumerate(zip(wanted, results, strict=True), 1):
            kernel.compiled[target] = compiled
            if number % 50 == 0:
                print(f"{number} of {len(wanted)} compiled", flush=True)


def faults_of(kernels: Iterable[Kernel]) -> Iterator[str]:
    """Each in a line that names target, kernel, constants and who launches it."""
    for kernel in kernels:
        made = kernel.specialisation
        constants = ", ".join(f"{name}={value}" for name, value in made.constants.items())
        users = "; ".join(f"{shape}: {', '.join(by)}" for shape, by in kernel.used_by.items())
        for target, compiled in kernel.compiled.items():
            for fault in compiled.faults:
                yield f"{target}: {made.kernel}({constants}) {fault}. Launched by {users}."


def write(path: Path, kernels: Sequence[Kernel], seconds: float) -> None:
    """A kernel a line."""
    head = {
        "name": "gpu-compile",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": current_commit(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "seconds": round(seconds),
        "faults": list(faults_of(kernels)),
        "columns": COLUMNS,
    }
    lines = [json.dumps(kernel.to_dict()) for kernel in kernels]
    path.parent.mkdir(parents=True, exist_ok=True)
    start = json.dumps(head, indent=1)[:-2]
    path.write_text(start + ',\n "kernels": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    found = collect(arguments.shapes, tuple(KV_DTYPES), BLOCK_SIZES)
    if arguments.products:
        found |= collect_products()
    kernels = list(found.values())
    print(f"{len(kernels)} kernels for {len(arguments.targets)} targets", flush=True)
    compile_all(kernels, arguments.targets, arguments.processes)
    seconds = time.monotonic() - started
    faults = list(faults_of(kernels))
    print("\n".join(faults))
    if arguments.out:
        write(arguments.out, kernels, seconds)
    print(f"{len(kernels)} kernels, {len(faults)} faults, {seconds:.0f} s")
    return 1 if faults or not kernels else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--shapes", nargs="*", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--no-products", dest="products", action="store_false")
    parser.add_argument("--targets", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
