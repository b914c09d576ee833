"""The processors that kernels are compiled for.

Processors of many models share a few sets of instructions. A kernel that is compiled for such a
set, and not for the model of the machine it is compiled on, can be compiled anywhere before it is
wanted: see `pagoda_kernels.cpu.ahead`. It is as fast: what differs is the order of instructions.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import NamedTuple

import llvmlite.binding
import numba


class Target(NamedTuple):
    """A set of instructions, in LLVM's words."""

    name: str
    cpu: str
    features: frozenset[str]
    """What the processor must have."""
    tuning: tuple[str, ...] = ()

    @property
    def feature_flags(self) -> str:
        """What LLVM is told to use."""
        return ",".join([*(f"+{name}" for name in sorted(self.features)), *self.tuning])


_AVX2 = frozenset({"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# LLVM would halve the vectors, for the first processors that had them.
_WHOLE_VECTORS = ("-prefer-256-bit",)

TARGETS = (
    Target(
        "avx512-bf16",
        "x86-64-v4",
        _AVX512 | {"avx512bf16", "avx512vbmi", "avx512vnni"},
        _WHOLE_VECTORS,
    ),
    Target("avx512-vnni", "x86-64-v4", _AVX512 | {"avx512vnni"}, _WHOLE_VECTORS),
    Target("avx2", "x86-64-v3", _AVX2),
)
"""The best comes first. Processors that have none of them get kernels of their own."""


def targets_of(machine: str) -> tuple[Target, ...]:
    """Those that a machine's compiler can compile for; machine is of platform.machine()."""
    return TARGETS if machine in ("x86_64", "AMD64") else ()


def choose_target(machine: str, features: frozenset[str]) -> Target | None:
    """The best for a processor with these features; None if it is of no known kind."""
    return next((target for target in targets_of(machine) if target.features <= features), None)


def _host_features() -> frozenset[str]:
    features = llvmlite.binding.get_host_cpu_features()
    return frozenset(name for name, is_there in features.items() if is_there)


@cache
def features() -> frozenset[str]:
    """Of the processor that kernels are compiled for, as LLVM names them."""
    flags = numba.config.CPU_FEATURES
    if flags is None:
        return _host_features()
    return frozenset(flag[1:] for flag in flags.split(",") if flag.startswith("+"))


def _aim() -> None:
    """Let numba compile for this processor's target, unless it was told another."""
    if numba.config.CPU_NAME is None and numba.config.CPU_FEATURES is None:
        target = choose_target(platform.machine(), _host_features())
        if target is not None:
            numba.config.CPU_NAME = target.cpu
            numba.config.CPU_FEATURES = target.feature_flags


_aim()
