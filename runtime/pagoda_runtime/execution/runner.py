"""A model from its name, with its KV cache, ready for steps."""

from __future__ import annotations

from functools import partial

import torch

from pagoda_kernels.paged_attention import make_backend
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.loading import load_model
from pagoda_runtime.execution.memory import (
    MakeBackend,
    dtype_name,
    fit_kv_cache,
    format_bytes,
    kv_dtype_name,
    make_attention,
    must_fit,
)
from pagoda_runtime.execution.profiling import find_step_bytes
from pagoda_runtime.execution.steps import StepRunner
from pagoda_runtime.ipc.messages import EngineReady, ScheduledRow
from pagoda_runtime.logs import timed
from pagoda_runtime.models.download import OnProgress
from pagoda_runtime.parallel import ALONE, TensorParallel
from pagoda_runtime.platforms import Platform, choose_platform
from pagoda_runtime.sampling_params import SamplingParams


def no_progress(phase: str, percent: float, bytes_per_second: float) -> None:
    """The listener of those who do not care."""


class ModelRunner(StepRunner):
    """A loaded model with its KV cache.

    Args:
        parallel: of several ranks each has a runner, and all execute the same steps.
        platform: None: that of config.device.
        backend: what makes the attention; by default the fastest for the device.
    Raises: FatalError when the model cannot be loaded or does not fit.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_progress: OnProgress = no_progress,
        parallel: TensorParallel = ALONE,
        platform: Platform | None = None,
        backend: MakeBackend = make_backend,
    ) -> None:
        assert parallel.size == config.tensor_parallel_size
        platform = platform or choose_platform(config.device)
        platform.verify(config)
        platform.configure(config, parallel.rank)
        config = platform.complete(config)
        model = load_model(config, platform, parallel, on_progress)
        attention = make_attention(config, model, backend)
        find_bytes = partial(find_step_bytes, config, model, attention, platform)
        size = fit_kv_cache(config, model.config, attention, platform, parallel, find_bytes)
        self.num_blocks, self.block_size = size.num_blocks, attention.spec.block_size
        self.max_model_len = size.max_model_len
        model.set_max_model_len(size.max_model_len)
        flag = Platform.cache_flag if config.kv_cache_memory_bytes else platform.cache_flag
        with must_fit(
            platform,
            f"{format_bytes(size.total_bytes)} of KV cache, and steps and graphs beside it, do",
            f"Lower {flag} or --max-num-seqs (engine.maxNumSeqs).",
        ):
            with torch.inference_mode():
                attention.allocate(size.num_blocks + 1)
                super().__init__(
                    model,
                    attention,
                    platform,
                    max_num_seqs=config.max_num_seqs,
                    max_model_len=size.max_model_len,
                )
            on_progress("warmup", 0.0, 0.0)
            with timed("Warming up"):
                self._warm_up()
            if self.decode_steps is not None and not config.enforce_eager:
                with timed("Recording graphs"):
                    self.record_graphs()
        on_progress("warmup", 100.0, 0.0)
        self.ready_facts = self._describe(parallel.size)

    def _describe(self, tensor_parallel_size: int) -> EngineReady:
        config, windows = self.model.config, self.model.windows
        return EngineReady(
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            vocab_size=config.vocab_size,
            sliding_window=0 if 0 in windows else max(windows),
            doubling_depth=self.model.doubling_depth,
            eos_token_ids=list(config.eos_token_ids),
            dtype=dtype_name(self.model.placement.dtype),
            kv_cache_dtype=kv_dtype_name(self.attention.spec.kv_dtype),
            device=self.platform.name,
            architecture=config.architecture,
            quantization=config.quantization.method if config.quantization else "none",
            tensor_parallel_size=tensor_parallel_size,
            default_sampling=dict(config.default_sampling),
        )

    def _warm_up(self) -> None:
        """Run one prefill and one decode step, so that the first request pays for no set-up."""
        num_tokens = min(self.block_size, self.max_model_len - 1)
        params = SamplingParams(temperature=0.0)
        for start, token_ids in ((0, [0] * num_tokens), (num_tokens, [0])):
            num_blocks = -(-(start + len(token_ids)) // self.block_size)
            row = ScheduledRow(
                request_id="warmup",
                token_ids=token_ids,
                start=start,
                # Block 0 holds padding: nothing of the warm-up can be seen by a request.
                block_table=[0] * num_blocks,
                sampling_params=params,
            )
            self.submit([row]).result()
