"""An NVIDIA GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.platforms.base import MemoryBudget, MemoryUse, Platform, Record, Replay

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
    is_asynchronous = True
    out_of_memory = "GpuOutOfMemory"
    cache_flag = "--gpu-memory-utilization (engine.gpuMemoryPercent)"

    def is_available(self) -> bool:
        import torch

        return torch.cuda.is_available()

    def count_devices(self) -> int:
        import torch

        return torch.cuda.device_count()

    def device(self, rank: int = 0) -> torch.device:
        import torch

        # In a test several ranks share the one GPU, or there is none.
        return torch.device(self.name, rank % max(1, self.count_devices()))

    def describe(self) -> str:
        import torch

        return torch.cuda.get_device_name()

    def memory_budget(self, config: EngineConfig, step_bytes: int) -> MemoryBudget:
        """What gpu_memory_utilization leaves beside the weights and the largest step."""
        import torch

        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        available = int(free - (1.0 - config.gpu_memory_utilization) * total)
        return MemoryBudget(available - step_bytes, self.cache_flag)

    def measure(self, run: Callable[[], object]) -> MemoryUse:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        # Reserved, not allocated: what lies between is lost to a step as well.
        peak = torch.cuda.max_memory_reserved() - reserved
        torch.cuda.empty_cache()
        # Of the whole device: graphs and kernels take memory that torch does not count.
        return MemoryUse(peak, max(0, free - torch.cuda.mem_get_info()[0]))

    def recorder(self) -> Record:
        """Of CUDA graphs, whose tensors lie in one pool of memory: only one runs at a time."""
        import torch

        # Garbage that is a graph must not be found while another one is recorded.
        gc.collect()
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

        def record(run: Callable[[], None]) -> Replay:
            graph = torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            # Not torch.cuda.graph, which collects all garbage and gives all memory back each time.
            with torch.cuda.stream(stream):
                # What other threads do meanwhile, as NCCL's, is none of the graph's business.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
            return graph.replay

        return record
