"""What an engine takes of a device's memory."""

from __future__ import annotations

import pytest
import torch

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution.profiling import largest_steps
from pagoda_runtime.execution.runner import ModelRunner

SETTINGS = {"kv_cache_memory_bytes": None, "max_num_batched_tokens": 512, "max_num_seqs": 4}
SHARE = 0.3


def test_the_largest_steps_run_beside_the_cache(platform, folders, make_runner):
    runner = make_runner(folders("llama"), gpu_memory_utilization=SHARE, **SETTINGS)
    config = EngineConfig(model="", max_num_batched_tokens=512, max_num_seqs=4)
    for rows in largest_steps(config, runner.block_size, runner.max_model_len):
        assert len(runner.execute(rows)) == len(rows)
    if platform.name == "cuda":
        free, total = torch.cuda.mem_get_info()
        assert total - free < SHARE * total


@pytest.mark.gpu
def test_a_share_that_is_too_small_is_refused(folders):
    config = EngineConfig(
        model=str(folders("llama")), device="cuda", gpu_memory_utilization=0.001, max_model_len=256
    )
    with pytest.raises(FatalError, match="gpu-memory-utilization") as caught:
        ModelRunner(config)
    assert caught.value.reason == "KvCacheTooSmall"
