"""Compile launches for GPUs that are not there, and look at what came out.

Triton compiles without a driver and without a device: it only asks a driver for which target.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from pagoda_kernels.launch import Launch, options_for

_KIB = 1024
# torch's allocators align what they give out at least to this.
_ALIGNMENT = 256
# From so many rows and warps on a tile fills Hopper's and Blackwell's own instructions.
_LARGE_TILE, _LARGE_WARPS = 64, 4
_DOTS = ("mma.sync", "wgmma", "tcgen05.mma", "v_mfma")
# Loads and stores of a thread's own stack. A call that has a stack touches it by nothing else.
_SPILLS = re.compile(r"\b(STL|LDL)\b")


class Target(NamedTuple):
    """A kind of GPU."""

    gpu: GPUTarget
    shared_limit_bytes: int
    """Shared memory that a block may take."""
    small_dot: str
    """The instruction of its tensor cores."""
    large_dot: str
    """The one for tiles of 64 rows and more, and 4 warps."""
    multiplies_e4m3: bool
    """Other targets get no kernel that does."""


def _nvidia(capability: int, shared_limit_kib: int, large_dot: str = "mma.sync") -> Target:
    gpu = GPUTarget("cuda", capability, 32)
    return Target(gpu, shared_limit_kib * _KIB, "mma.sync", large_dot, capability >= 89)


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "80": _nvidia(80, 163),
        "86": _nvidia(86, 99),
        "89": _nvidia(89, 99),
        "90": _nvidia(90, 227, "wgmma"),
        "100": _nvidia(100, 227, "tcgen05.mma"),
        "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * _KIB, "v_mfma", "v_mfma", False),
    }
)
"""By compute capability, or architecture of AMD.

Source: NVIDIA, CUDA C++ Programming Guide, Technical Specifications per Compute Capability; AMD,
Instinct MI300 Instruction Set Architecture.
"""


class Driver(NamedTuple):
    """What Triton asks, with the answers of a target in the place of a GPU's."""

    target: GPUTarget
    device: str
    """Triton keeps what it compiled by device."""

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Pointer:
    """A tensor, as far as Triton compiles for it: its dtype, and what its address is divided by."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address

    @classmethod
    def to(cls, tensor: torch.Tensor) -> Pointer:
        return cls(tensor.dtype, int(tensor.storage_offset()) * tensor.dtype.itemsize % _ALIGNMENT)


class Specialisation(NamedTuple):
    """What a kernel is compiled for; other launches may share it."""

    module: str
    kernel: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    signature: str
    """The types of the arguments, as Triton names them."""

    @property
    def constants(self) -> dict[str, Any]:
        return {name: str(value) for name, value in self.options.items() if name.isupper()}

    @property
    def has_e4m3(self) -> bool:
        return "fp8e4nv" in self.signature

    def compile(self, target: Target) -> Any:
        """What Triton makes of it."""
        triton.runtime.driver.set_active(Driver(target.gpu, str(target.gpu.arch)))
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        options = options_for(self.options, is_nvidia=target.gpu.backend == "cuda")
        return kernel.warmup(*self.args, grid=(1,), **options)


def specialise(launches: Iterable[Launch], target: Target) -> dict[str, Specialisation]:
    """What Triton would compile for these launches, each once, by Triton's own key."""
    # A device of which Triton never has anything compiled, so that it always asks the hook.
    triton.runtime.driver.set_active(Driver(target.gpu, f"none of {target.gpu.arch}"))
    found: dict[str, Specialisation] = {}
    noted: dict[str, Any] = {}

    def note(*, key: str, compile: dict[str, Any], **_: Any) -> bool:  # noqa: A002
        noted.update(compile, key=key)
        # Which says that nothing is to be compiled.
        return True

    triton.knobs.runtime.jit_cache_hook = note
    try:
        for launch in launches:
            args = tuple(
                Pointer.to(arg) if isinstance(arg, torch.Tensor) else arg for arg in launch.args
            )
            launch.kernel.warmup(*args, grid=(1,), **launch.options)
            types = [kind for kind in noted["signature"].values() if kind != "constexpr"]
            function = launch.kernel.fn
            found.setdefault(
                f"{launch.kernel.cache_key} {noted['key']}",
                Specialisation(
                    function.__module__, function.__name__, args, launch.options, ", ".join(types)
                ),
            )
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    return found


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a kernel takes of a GPU."""

    registers: int
    """Of a thread; on AMD vector registers."""
    spilled_bytes: int
    """Of a thread; above 0: registers did not suffice."""
    shared_bytes: int
    """Of a block."""
    num_warps: int
    dots: tuple[str, ...]
    """Instructions of the tensor cores."""
    faults: tuple[str, ...] = ()


def examine(binary: Any, target: Target) -> Compiled:
    """Look at what Triton compiled for a target."""
    is_nvidia = target.gpu.backend == "cuda"
    text = binary.asm["ptx" if is_nvidia else "amdgcn"]
    find = _find_nvidia_numbers if is_nvidia else _find_amd_numbers
    registers, spilled_bytes = find(binary.asm["cubin"] if is_nvidia else text)
    found = tuple(dot for dot in _DOTS if dot in text)
    shared_bytes = binary.metadata.shared
    faults = []
    if spilled_bytes:
        faults.append(f"spills {spilled_bytes} bytes of registers")
    if shared_bytes > target.shared_limit_bytes:
        faults.append(
            f"takes {shared_bytes} bytes of shared memory, and a block may take "
            f"{target.shared_limit_bytes}"
        )
    wanted = wanted_dots(binary.asm["ttir"], binary.metadata.num_warps, target)
    if set(found) != wanted:
        shown = " and ".join(sorted(wanted)) or "no tensor cores"
        faults.append(f"multiplies by {' and '.join(found) or 'no tensor cores'}, not {shown}")
    return Compiled(
        registers,
        spilled_bytes,
        shared_bytes,
        binary.metadata.num_warps,
        found,
        tuple(faults),
    )


def wanted_dots(ttir: str, num_warps: int, target: Target) -> set[str]:
    """The instructions that a kernel's products of tiles are to be made of."""
    rows = [int(found) for found in re.findall(r"tt\.dot [^\n]*?: tensor<(\d+)x", ttir)]
    has_warps = num_warps >= _LARGE_WARPS
    return {
        target.large_dot if has_warps and num >= _LARGE_TILE else target.small_dot for num in rows
    }


def _find_nvidia_numbers(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of registers that went to memory."""
    usage = _dump(cubin, "-res-usage")
    stack_bytes = _number_after("STACK:", usage)
    has_spilled = stack_bytes > 0 and _SPILLS.search(_dump(cubin, "-sass")) is not None
    return _number_after("REG:", usage), stack_bytes if has_spilled else 0


def _find_amd_numbers(amdgcn: str) -> tuple[int, int]:
    """The same of vector registers; some go to the accumulators' registers, not to memory."""
    scratch_bytes = _number_after(r"\.private_segment_fixed_size:\s+", amdgcn)
    num_spilled = _number_after(r"\.vgpr_spill_count:\s+", amdgcn)
    return _number_after(r"\.vgpr_count:\s+", amdgcn), max(scratch_bytes, 4 * num_spilled)


def _number_after(pattern: str, text: str) -> int:
    found = re.search(rf"{pattern}(\d+)", text)
    assert found is not None, text
    return int(found[1])


def _dump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
