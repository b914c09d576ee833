"""Where Triton kernels run, and their launches: real ones, or noted where tensors are fake."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels are run by Python, on a CPU's tensors. Triton asks the same when a
kernel is decorated, so the variable has to be set before the process starts."""


def uses_triton(device: torch.device) -> bool:
    """Whether operations on tensors of a device are Triton kernels."""
    return device.type == "cuda" or IS_INTERPRETED


def num_processors(device: torch.device) -> int:
    """Of a GPU; where there is none, as in rehearsals, an H100's."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of NVIDIA's GPUs; of others (0, 0); where there is none, as in rehearsals, an H100's."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 9, 0
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


class Launch(NamedTuple):
    """A launch that was noted and not made."""

    kernel: Any
    """What @triton.jit returned."""
    grid: Sequence[int]
    args: Sequence[Any]
    """Tensors, fake, and numbers."""
    options: dict[str, Any]
    """The kernel's constants and Triton's own, as num_warps."""


class LaunchRecorder(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Makes tensors without data, on devices that need not be there, and notes their kernels.

    What a step would do on a GPU can be seen so where there is none: `launches` has what it would
    launch, and tensors of two devices or a look at a number raise as they are reached.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.launches: list[Launch] = []


def options_for(options: Mapping[str, Any], *, is_nvidia: bool) -> dict[str, Any]:
    """Those of a launch that Triton takes for the device."""
    return {name: value for name, value in options.items() if is_nvidia or name != "maxnreg"}


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its tensors, the first of args among them.

    Args:
        options: the kernel's constants (tl.constexpr), num_warps, num_stages; and maxnreg, which
            only NVIDIA's GPUs have.
    """
    # What Triton does by default, until 3.10; saying nothing about it makes 3.9 warn.
    options = {"enable_fp_fusion": True, **options_for(options, is_nvidia=not torch.version.hip)}
    recorder = getattr(args[0], "fake_mode", None)
    if recorder is None:
        kernel[tuple(grid)](*args, **options)
    else:
        recorder.launches.append(Launch(kernel, tuple(grid), args, options))
