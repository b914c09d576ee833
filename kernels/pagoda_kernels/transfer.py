"""Numbers from the host to a device, and back, without a wait for the device.

A GPU copies by itself from and to pages of the host that stay where they are ("pinned"). torch
hands such pages out again only after the copies from and to them are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device; on a CPU the array itself."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    # Not like the tensor: of one number a fake one is computed with for real, without a GPU too.
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def all_to_device(
    arrays: Sequence[npt.NDArray[np.generic]], device: torch.device
) -> list[torch.Tensor]:
    """The arrays as tensors on the device, in one transfer."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    # Each begins at a multiple of 16 bytes, as a tensor of its own would: kernels depend on it.
    ends = [*accumulate(array.nbytes + -array.nbytes % 16 for array in arrays)]
    starts = [0, *ends[:-1]]
    packed = np.empty(ends[-1], np.uint8)
    for array, start in zip(arrays, starts, strict=True):
        packed[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    sent = to_device(packed, device)
    return [
        sent[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]


class OnTheWay:
    """A tensor's numbers, as they are once the work that the device has now is done.

    What is begun on the device afterwards neither changes nor delays them.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cpu":
            self._numbers = tensor.clone()
            return
        self._numbers = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._numbers.copy_(tensor, non_blocking=True)
        if not hasattr(tensor, "fake_mode"):
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> npt.NDArray[np.generic]:
        """The numbers; the host waits for them here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: npt.NDArray[np.generic] = self._numbers.numpy()
        return found
