"""A CPU, with the cores and the memory that the cgroup allows."""

from __future__ import annotations

from typing import ClassVar

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.platforms.base import MemoryBudget, Platform
from pagoda_runtime.platforms.machine import (
    free_memory_bytes,
    instruction_set,
    memory_bandwidth_gbps,
)

# Share of the free memory that the KV cache takes unless it is told otherwise.
_KV_CACHE_SHARE = 0.25


class CpuPlatform(Platform):
    name, noun = "cpu", "a CPU"
    # A prompt chunk delays everybody's next token by the time it takes: about a quarter of a second
    # for 512 tokens of a small model on two cores. So a step in which somebody decodes takes fewer.
    defaults: ClassVar = {
        "block_size": 32,
        "max_num_batched_tokens": 512,
        "long_prefill_token_threshold": 28,
        "async_scheduling": False,
    }
    # A matter of sense: ranks on one machine gain nothing but their own memory.
    max_tensor_parallel_size = 16
    collectives = "gloo"
    is_asynchronous = False
    out_of_memory = "OutOfMemory"

    def is_available(self) -> bool:
        return True

    def describe(self) -> str:
        return f"instructions {instruction_set()}"

    def memory_budget(self, config: EngineConfig, step_bytes: int) -> MemoryBudget:
        """A share of what is free, which ranks divide: a step takes little of it, other processes
        may take the rest.
        """
        available = int(free_memory_bytes() * _KV_CACHE_SHARE) // config.tensor_parallel_size
        return MemoryBudget(available, "the memory limit (resources.memory)")

    def memory_bandwidth_gbps(self) -> float:
        return memory_bandwidth_gbps()
