"""Numbers from the host to a device, and back, without a wait for the device.

A GPU copies by itself from and to pages of the host that stay where they are ("pinned"). torch
hands such pages out again only after the copies from and to them are done.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device; on a CPU the array itself."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    pinned = torch.empty_like(tensor, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


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
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> npt.NDArray[np.generic]:
        """The numbers; the host waits for them here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: npt.NDArray[np.generic] = self._numbers.numpy()
        return found
