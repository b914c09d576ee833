"""An NVIDIA GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.platforms.base import MemoryBudget, Platform

if TYPE_CHECKING:
    import torch


class CudaPlatform(Platform):
    name, noun = "cuda", "a GPU"
    defaults: ClassVar = {
        "block_size": 16,
        "max_num_batched_tokens": 2048,
        "long_prefill_token_threshold": 2048,
        "async_scheduling": True,
    }
    # Of a machine; how many it has is asked when the ranks connect.
    max_tensor_parallel_size = 1024
    collectives = "nccl"
    is_deterministic = False
    samples_in_batch = True
    out_of_memory = "GpuOutOfMemory"

    def is_available(self) -> bool:
        import torch

        return torch.cuda.is_available()

    def count_devices(self) -> int:
        import torch

        return torch.cuda.device_count()

    def configure(self, config: EngineConfig, rank: int) -> None:
        import torch

        torch.cuda.set_device(self.device(rank))
        super().configure(config, rank)

    def device(self, rank: int = 0) -> torch.device:
        import torch

        # In a test several ranks share the one GPU.
        return torch.device(self.name, rank % self.count_devices())

    def describe(self) -> str:
        import torch

        return torch.cuda.get_device_name()

    def memory_budget(self, config: EngineConfig, step_bytes: int) -> MemoryBudget:
        """What gpu_memory_utilization leaves beside the weights and the largest step."""
        import torch

        free, total = torch.cuda.mem_get_info()
        available = int(free - (1.0 - config.gpu_memory_utilization) * total)
        return MemoryBudget(
            available - step_bytes, "--gpu-memory-utilization (engine.gpuMemoryPercent)"
        )
