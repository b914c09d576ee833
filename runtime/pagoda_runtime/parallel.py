"""The ranks that divide a model between them, and what they compute together."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed import Work

from pagoda_runtime.errors import FatalError

_LOOPBACK = "127.0.0.1"
# Longer than any step: rank 0's process watches the others, and can name the one to blame.
_TIMEOUT = timedelta(days=1)


class Group(Protocol):
    """What of torch's process groups is used here; they need no global state."""

    def allreduce(self, tensors: list[torch.Tensor]) -> Work: ...

    def allgather(self, found: list[list[torch.Tensor]], own: list[torch.Tensor]) -> Work: ...


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place among those that divide every layer between them.

    All ranks call the methods below in the same order, and wait for each other there.

    Args:
        group: without one the ranks do not hear each other, and a sum is this rank's part of it.
    """

    rank: int = 0
    size: int = 1
    group: Group | None = field(default=None, compare=False)

    def share(self, num_units: int) -> range:
        """This rank's of so many units; if they are fewer than ranks, several have the same one."""
        count = max(1, num_units // self.size)
        first = self.rank * num_units // self.size
        return range(first, first + count)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, the same bits everywhere; x is overwritten with it."""
        if self.group is not None:
            self.group.allreduce([x]).wait()
        return x

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Each rank's x, in the ranks' order; all have one shape."""
        if self.group is None:
            return [x]
        found = [torch.empty_like(x) for _ in range(self.size)]
        self.group.allgather([found], [x.contiguous()]).wait()
        return found

    def smallest(self, number: int, device: torch.device) -> int:
        """Of the numbers that the ranks name."""
        found = self.all_gather(torch.tensor([number], device=device))
        return min(int(one) for one in found)


ALONE = TensorParallel()
# torch declares no types for what is used of it here.
_distributed: Any = torch.distributed


def connect(
    rank: int, size: int, folder: str, device: torch.device, *, backend: str
) -> TensorParallel:
    """This rank's place, once all ranks have come.

    Args:
        folder: of all ranks alone; a file in it tells each where the others are.
        device: this rank's.
        backend: gloo or nccl.
    Raises: FatalError: NcclInitFailed.
    """
    store = _distributed.FileStore(str(Path(folder, "ranks")), size)
    if backend == "nccl":
        return TensorParallel(rank, size, _connect_nccl(store, rank, size, device))
    gloo = _distributed.ProcessGroupGloo
    options = gloo._Options()
    # By default it asks for the address of the host's name, and some hosts have none.
    options._devices = [gloo.create_device(hostname=_LOOPBACK)]
    options._timeout = _TIMEOUT
    return TensorParallel(rank, size, gloo(store, rank, size, options))


def _connect_nccl(store: Any, rank: int, size: int, device: torch.device) -> Group:
    nccl = _distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = _TIMEOUT
    try:
        group: Group = nccl(store, rank, size, options)
        # Only the first message makes the connections.
        group.allreduce([torch.zeros(1, device=device)]).wait()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise FatalError(
            "NcclInitFailed",
            f"NCCL cannot connect {size} GPUs (--tensor-parallel-size, engine.tensorParallelSize): "
            f"{error}. Set NCCL_DEBUG=INFO to see why, and see that /dev/shm is large enough.",
        ) from error
    return group
