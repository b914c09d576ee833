"""What depends on the device, asked of one object."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pagoda_runtime.config import SUPPORTED_DTYPES, EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.platforms.machine import allowed_cores

logger = logging.getLogger("pagoda.engine")

if TYPE_CHECKING:
    # Flags' help is made from the defaults here, by a process that never needs torch.
    import torch


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes that the KV cache may take, and the knob that the user turns to change that."""

    available_bytes: int
    knob: str


class Platform(ABC):
    """A kind of device that engines run on. A new kind is a file, and a row of `PLATFORMS`."""

    name: ClassVar[str]
    """As torch and --device name it."""
    noun: ClassVar[str]
    """In the help of flags: 512 on {noun}."""
    defaults: ClassVar[Mapping[str, int]]
    """Of the fields of EngineConfig that are None."""
    dtypes: ClassVar[tuple[str, ...]] = SUPPORTED_DTYPES
    kv_cache_dtypes: ClassVar[tuple[str, ...]] = ("auto",)
    max_tensor_parallel_size: ClassVar[int] = 1
    is_deterministic: ClassVar[bool]
    """Whether it serves --deterministic."""
    samples_in_batch: ClassVar[bool]
    """Whether all rows of a step are sampled at once: where a row at a time costs a
    synchronisation each."""
    out_of_memory: ClassVar[str]
    """The reason of a FatalError."""

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

    def configure(self, num_threads: int | None) -> None:
        """Set torch's threads, by default as many as the cgroup allows cores; log them."""
        import torch

        num_threads = num_threads or allowed_cores()
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        logger.info("Device %s, %s", self.name, self.describe())
        logger.info("%d threads", num_threads)

    def memory_bandwidth_gbps(self) -> float | None:
        """GB/s of reading memory, measured; None where that is not worth the time."""
        return None

    def verify(self, config: EngineConfig) -> None:
        """Raises FatalError InvalidFlags for flags that this platform cannot serve."""
        size, most = config.tensor_parallel_size, self.max_tensor_parallel_size
        if size > most:
            raise FatalError(
                "InvalidFlags",
                f"--tensor-parallel-size (engine.tensorParallelSize) is {size}; this version runs "
                f"on one device only. Set it to {most}.",
            )
        if config.kv_cache_dtype not in self.kv_cache_dtypes:
            raise FatalError(
                "InvalidFlags",
                f"--kv-cache-dtype (engine.kvCacheDtype) is {config.kv_cache_dtype}; this version "
                f"has no such KV cache on {self.noun}. Set it to "
                f"{' or '.join(self.kv_cache_dtypes)}.",
            )
        if config.dtype not in ("auto", *self.dtypes):
            raise FatalError(
                "InvalidFlags",
                f"--dtype (engine.dtype) is {config.dtype}; it must be auto, "
                f"{', '.join(self.dtypes)}.",
            )
        if config.deterministic and not self.is_deterministic:
            raise FatalError(
                "InvalidFlags",
                "--deterministic is for the CPU in this version. Leave it out, or give --device "
                "cpu.",
            )

    def device(self) -> torch.device:
        import torch

        return torch.device(self.name)

    def complete(self, config: EngineConfig) -> EngineConfig:
        """The config with this platform's defaults in the place of None."""
        missing: dict[str, Any] = {
            name: n for name, n in self.defaults.items() if getattr(config, name) is None
        }
        return replace(config, **missing) if missing else config
