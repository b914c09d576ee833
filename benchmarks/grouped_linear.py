"""Products with matrices of 4 and 8 bits in groups beside those of bf16, alone, on a CPU.

Several matrices take turns, which together are larger than the caches; random numbers.
`make bench-grouped-linear` runs it.

    python benchmarks/grouped_linear.py --out FILE [--rounds 5] [--threads 2] [--shapes 12288x2048]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from report import Bar, Result, publish
from torch import Tensor
from turns import take_turns

from pagoda_kernels.grouped_linear import Grouped, GroupedShape, make_grouped_linear
from pagoda_kernels.grouped_linear.reference import dequantize
from pagoda_runtime.quantization.unquantized import make_product

SHAPES = ("12288x2048", "2048x6144")
"""Outputs and inputs: gate and up, and down, of Qwen3-1.7B."""
NUM_ROWS = (1, 4, 8, 16, 256, 1000)
KINDS = {
    "int8": (8, 0, True),
    "int4_128": (4, 128, True),
    "int4_128_zeros": (4, 128, False),
    "int4_32": (4, 32, True),
}
"""Bits, the group's size (0: all inputs), and whether zeros are in the middle."""
BARS = {
    ("int4_128", 1): 1.6,
    ("int4_32", 1): 1.6,
    ("int8", 16): 2.5,
    ("int8", 256): 3.0,
    ("int8", 1000): 3.0,
}
CACHES_BYTES = 200 << 20
ROWS_PER_TURN = 512

Product = Callable[[Tensor], Tensor]


def shape_of(kind: str, outputs: int, inputs: int) -> GroupedShape:
    bits, group_size, _ = KINDS[kind]
    return GroupedShape(outputs, inputs, bits, group_size or inputs)


def make_rows(kind: str, shape: GroupedShape) -> Grouped:
    """Normally distributed whole numbers."""
    middle = 2.0 ** (shape.bits - 1)
    integers = (torch.randn(shape.outputs, shape.inputs) * middle / 4).round_() + middle
    scales = torch.rand(shape.outputs, shape.inputs // shape.group_size) + 0.5
    zeros = None if KINDS[kind][2] else torch.full_like(scales, middle)
    return Grouped(integers.clamp_(0, 2 * middle - 1).to(torch.uint8), scales, zeros)


def make_linear(kind: str, shape: GroupedShape, rows: Grouped) -> Product:
    linear = make_grouped_linear(
        shape, dtype=torch.bfloat16, device=torch.device("cpu"), is_symmetric=KINDS[kind][2]
    )
    linear.fill(0, rows)
    linear.finish(None)
    return linear


def make_several(kind: str, outputs: int, inputs: int) -> list[Product]:
    """Larger than the caches together."""
    bits = KINDS[kind][0] if kind in KINDS else 16
    count = -(-CACHES_BYTES * 8 // (outputs * inputs * bits))
    if kind not in KINDS:
        return [make_product(torch.randn(outputs, inputs).bfloat16()) for _ in range(count)]
    shape = shape_of(kind, outputs, inputs)
    rows = make_rows(kind, shape)
    return [make_linear(kind, shape, rows) for _ in range(count)]


def error_of(kind: str, inputs: int) -> Result:
    """Of products with normally distributed rows, relative to them."""
    shape = shape_of(kind, 512, inputs)
    rows, x = make_rows(kind, shape), torch.randn(16, inputs).bfloat16()
    exact = x.double() @ dequantize(rows, shape).double().T
    off = torch.norm(make_linear(kind, shape, rows)(x).double() - exact) / torch.norm(exact)
    return Result(f"error_{kind}_{inputs}", 100 * float(off), "%", "1 %", 1.0, Bar(at_most=1.0))


def compare(shape: str, rounds: int) -> list[Result]:
    outputs, inputs = map(int, shape.split("x"))
    products = {kind: make_several(kind, outputs, inputs) for kind in ("bf16", *KINDS)}
    results = []
    for num_rows in NUM_ROWS:
        x = torch.randn(num_rows, inputs).bfloat16()
        calls = max(1, min(16, ROWS_PER_TURN // num_rows))

        def measure(kind: str, number: int, x: Tensor = x, calls: int = calls) -> float:
            matrices = products[kind]
            matrices[number % len(matrices)](x)
            begin = perf_counter()
            for call in range(1, calls + 1):
                matrices[(number + call) % len(matrices)](x)
            return calls * len(x) / (perf_counter() - begin)

        turns = {kind: lambda number, k=kind, m=measure: m(k, number) for kind in products}
        speeds = take_turns(f"{shape}_{num_rows}", turns, rounds)
        for kind in KINDS:
            bar = BARS.get((kind, num_rows))
            results.append(
                Result(
                    f"{shape}_{kind}_{num_rows}",
                    speeds[kind],
                    "rows/s",
                    "bf16",
                    speeds["bf16"],
                    Bar(at_least=bar) if bar else None,
                    {"gflops": 2 * outputs * inputs * speeds[kind] / 1e9},
                )
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    results = []
    for shape in arguments.shapes:
        results += [error_of(kind, int(shape.split("x")[1])) for kind in KINDS]
    for shape in arguments.shapes:
        results += compare(shape, arguments.rounds)
    publish(
        "grouped-linear",
        results,
        arguments.out,
        rounds=arguments.rounds,
        kernel_threads=arguments.threads,
    )


if __name__ == "__main__":
    main()
