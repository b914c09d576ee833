"""What depends on the device, asked of one object."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pagoda_runtime.config import KV_CACHE_DTYPES, SUPPORTED_DTYPES, EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.platforms.machine import allowed_cores

logger = logging.getLogger("pagoda.engine")

_SIZE_FLAG = "--tensor-parallel-size (engine.tensorParallelSize)"

if TYPE_CHECKING:
    # Flags' help is made from the defaults here, by a process that never needs torch.
    import torch


Replay = Callable[[], None]
"""Does what was recorded again, on the same tensors."""
Record = Callable[[Callable[[], None]], Replay]
"""Runs a function once, and records what it has the device do. It was called before."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes that the KV cache may take, and the knob that the user turns to change that."""

    available_bytes: int
    knob: str


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Of the device's memory, beside what was held before."""

    peak_bytes: int
    """The most at a time."""
    kept_bytes: int
    """What is held afterwards."""


class Platform(ABC):
    """A kind of device that engines run on. A new kind is a file, and a row of `PLATFORMS`."""

    name: ClassVar[str]
    """As torch and --device name it."""
    noun: ClassVar[str]
    """In the help of flags: 512 on {noun}."""
    defaults: ClassVar[Mapping[str, int]]
    """Of the fields of EngineConfig that are None."""
    dtypes: ClassVar[tuple[str, ...]] = SUPPORTED_DTYPES
    kv_cache_dtypes: ClassVar[tuple[str, ...]] = ("auto", *KV_CACHE_DTYPES)
    max_tensor_parallel_size: ClassVar[int]
    collectives: ClassVar[str]
    """What ranks talk through: gloo or nccl."""
    is_asynchronous: ClassVar[bool]
    """Whether the host only tells the device what to do, and goes on: then a step's tokens stay
    there for the next one, and nothing is read before it is wanted."""
    out_of_memory: ClassVar[str]
    """The reason of a FatalError."""
    cache_flag: ClassVar[str] = "--kv-cache-memory-bytes"
    """What the user lowers for a smaller KV cache."""

    @abstractmethod
    def is_available(self) -> bool:
        """Whether this machine has such a device, as torch sees it."""

    @abstractmethod
    def describe(self) -> str:
        """What the log says of this machine's device."""

    @abstractmethod
    def memory_budget(self, config: EngineConfig, step_bytes: int) -> MemoryBudget:
        """What is left for the KV cache once the weights are loaded.

        Args:
            step_bytes: what the largest step needs beside weights and cache.
        """

    def configure(self, config: EngineConfig, rank: int) -> None:
        """Set torch's threads, and log them and the device."""
        import torch

        self.use_device(rank)
        num_threads = self.num_threads(config)
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        logger.info("Device %s, %s", self.name, self.describe())
        logger.info("%d threads", num_threads)

    def num_threads(self, config: EngineConfig) -> int:
        """Of a rank: they divide what the flag says, or the cores that the cgroup allows."""
        return max(1, (config.num_threads or allowed_cores()) // config.tensor_parallel_size)

    def measure(self, run: Callable[[], object]) -> MemoryUse | None:
        """Run it, and tell what memory that took; None, and nothing is run, where nobody counts."""
        return None

    def recorder(self) -> Record | None:
        """What records the device's work, in memory that all it records shares; None: nothing."""
        return None

    def memory_bandwidth_gbps(self) -> float | None:
        """GB/s of reading memory, measured; None where that is not worth the time."""
        return None

    def verify(self, config: EngineConfig) -> None:
        """Raises FatalError InvalidFlags for flags that this platform cannot serve."""
        if fault := self._find_fault(config):
            raise FatalError("InvalidFlags", fault)

    def _find_fault(self, config: EngineConfig) -> str | None:
        size, most = config.tensor_parallel_size, self.max_tensor_parallel_size
        if size > most:
            return f"{_SIZE_FLAG} is {size}; on {self.noun} it can be at most {most}."
        if config.kv_cache_dtype not in self.kv_cache_dtypes:
            known = " or ".join(self.kv_cache_dtypes)
            return (
                f"--kv-cache-dtype (engine.kvCacheDtype) is {config.kv_cache_dtype}; this version "
                f"has no such KV cache on {self.noun}. Set it to {known}."
            )
        if config.dtype not in ("auto", *self.dtypes):
            dtypes = ", ".join(self.dtypes)
            return f"--dtype (engine.dtype) is {config.dtype}; it must be auto, {dtypes}."
        if config.deterministic and size > 2:
            # In which order more than two numbers are added up depends on where in a step they are.
            return (
                f"--deterministic is for at most 2 ranks, and {_SIZE_FLAG} is {size}. Leave one of "
                "them out."
            )
        return None

    def verify_ranks(self, size: int) -> None:
        """Raises FatalError InvalidFlags if there are fewer devices here than ranks."""
        if size > (count := self.count_devices()):
            raise FatalError(
                "InvalidFlags",
                f"{_SIZE_FLAG} is {size}, but there are {count} devices of the kind {self.name} "
                "here. Lower it, or give the engine more (resources.gpu.count).",
            )

    def count_devices(self) -> int:
        """How many ranks can have one each."""
        return self.max_tensor_parallel_size

    def device(self, rank: int = 0) -> torch.device:
        """A rank's."""
        import torch

        return torch.device(self.name)

    def use_device(self, rank: int) -> None:
        """Let this thread compute on a rank's device where nothing says on which."""
        import torch

        if (index := self.device(rank).index) is not None:
            torch.accelerator.set_device_index(index)

    def complete(self, config: EngineConfig) -> EngineConfig:
        """The config with this platform's defaults in the place of None."""
        missing: Any = {n: v for n, v in self.defaults.items() if getattr(config, n) is None}
        return replace(config, **missing) if missing else config
