"""Steps on a GPU that is not there: what would be launched, and where the host would wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pagoda_kernels.launch import LaunchRecorder
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.memory import make_attention
from pagoda_runtime.execution.steps import StepRunner
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.registry import make_model
from pagoda_runtime.platforms import Record, Replay
from pagoda_runtime.platforms.cuda import CudaPlatform
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.by_module import get_linear_method

GPU = torch.device("cuda", 0)


class AbsentGpu(CudaPlatform):
    """A GPU that is not there; what is recorded on it is done again when it is replayed."""

    def recorder(self) -> Record:
        def record(run: Callable[[], None]) -> Replay:
            run()
            return run

        return record


@contextmanager
def absent_runner(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_num_seqs: int = 256,
    max_model_len: int = 8192,
    num_blocks: int = 65536,
    **flags: Any,
) -> Iterator[tuple[StepRunner, LaunchRecorder]]:
    """A runner of a model whose weights are fake, and what notes its launches.

    Within this context no tensor has data, so a step can be submitted and its result not asked for.

    Args:
        flags: of EngineConfig, as kv_cache_dtype, block_size and deterministic.
    """
    platform = AbsentGpu()
    engine_config = platform.complete(EngineConfig(model="", **flags))
    method = get_linear_method(config.quantization)
    placement = Placement(dtype, GPU, method, is_deterministic=engine_config.deterministic)
    with LaunchRecorder() as recorder, torch.no_grad():
        model = make_model(config, placement)
        model.after_loading()
        model.set_max_model_len(max_model_len)
        attention = make_attention(engine_config, model)
        attention.allocate(num_blocks + 1)
        yield (
            StepRunner(
                model,
                attention,
                platform,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
            ),
            recorder,
        )
