"""A model whose texts are pooled, ready for steps: no KV cache, no sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from pagoda_kernels.packed_attention import PackedAttention
from pagoda_kernels.transfer import OnTheWay, all_to_device
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.loading import load_model
from pagoda_runtime.execution.memory import attention_spec, dtype_name, must_fit
from pagoda_runtime.execution.runner import no_progress
from pagoda_runtime.ipc.messages import BlockCopy, EngineReady, Masks, RowOutput, ScheduledRow
from pagoda_runtime.layers.step_input import StepInput
from pagoda_runtime.logs import timed
from pagoda_runtime.models.check import verify_max_model_len
from pagoda_runtime.models.download import OnProgress
from pagoda_runtime.models.pooled import PooledModel
from pagoda_runtime.parallel import ALONE, TensorParallel
from pagoda_runtime.platforms import Platform, choose_platform
from pagoda_runtime.sampling_params import SamplingParams

_WARMUP_TOKENS = 32


@dataclass(frozen=True, slots=True)
class PooledStep:
    """A step that a device may still be computing."""

    pooled: OnTheWay
    """[num_rows, outputs] fp32."""

    def result(self) -> list[RowOutput]:
        return [RowOutput(pooled=row.tobytes()) for row in self.pooled.wait()]


class PoolingSteps:
    """Computes steps, one after the other; each row is a whole text."""

    def __init__(self, model: PooledModel, *, is_deterministic: bool) -> None:
        self.model = model
        spec = attention_spec(model, is_deterministic=is_deterministic)
        self.attention = PackedAttention(spec, is_causal=model.config.is_causal)

    @torch.inference_mode()
    def submit(
        self,
        rows: Sequence[ScheduledRow],
        copies: Sequence[BlockCopy] = (),
        masks: Masks | None = None,
    ) -> PooledStep:
        """Compute the rows' texts, or begin to."""
        lens = np.array([len(row.token_ids) for row in rows])
        ends = np.cumsum(lens)
        token_ids = np.fromiter(chain.from_iterable(row.token_ids for row in rows), np.int64)
        positions = np.arange(len(token_ids)) - np.repeat(ends - lens, lens)
        seconds = [row.second_text_start or len(row.token_ids) for row in rows]
        segments = (positions >= np.repeat(seconds, lens)).astype(np.int64)
        tokens, places, of_pair, counts, lasts = all_to_device(
            [token_ids, positions, segments, lens, ends - 1], self.attention.spec.device
        )
        hidden = self.model(StepInput(tokens, places, self.attention.plan(lens), of_pair))
        return PooledStep(OnTheWay(self.model.pool(hidden, counts, lasts)))


class PoolingRunner(PoolingSteps):
    """A loaded model whose texts are pooled.

    Args:
        parallel: of several ranks each has a runner, and all execute the same steps.
    Raises: FatalError when the model cannot be loaded or does not fit.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_progress: OnProgress = no_progress,
        parallel: TensorParallel = ALONE,
    ) -> None:
        platform = choose_platform(config.device)
        platform.verify(config)
        platform.configure(config, parallel.rank)
        config = platform.complete(config)
        model = load_model(config, platform, parallel, on_progress)
        assert isinstance(model, PooledModel)
        verify_max_model_len(model.config, config.max_model_len)
        max_model_len = config.max_model_len or model.config.max_position_embeddings
        model.set_max_model_len(max_model_len)
        super().__init__(model, is_deterministic=config.deterministic)
        self.ready_facts = _describe(model, platform, max_model_len, parallel.size)
        on_progress("warmup", 0.0, 0.0)
        with timed("Warming up"):
            self.submit([_row(min(_WARMUP_TOKENS, max_model_len))]).result()
            self._verify_memory(config, platform, max_model_len)
        on_progress("warmup", 100.0, 0.0)

    def _verify_memory(self, config: EngineConfig, platform: Platform, max_model_len: int) -> None:
        """Run the largest steps where the platform counts memory. Raises: FatalError."""
        assert config.max_num_batched_tokens is not None
        length = min(config.max_num_batched_tokens, max_model_len)
        num_rows = min(config.max_num_seqs, config.max_num_batched_tokens // length)

        def run_largest() -> None:
            self.submit([_row(length)] * num_rows).result()
            self.submit([_row(max_model_len)]).result()

        what = f"The weights, and texts of {max_model_len} tokens, do"
        remedy = "Lower --max-model-len (engine.maxModelLen), or use a larger device."
        with must_fit(platform, what, remedy):
            platform.measure(run_largest)


def _describe(
    model: PooledModel, platform: Platform, max_model_len: int, tensor_parallel_size: int
) -> EngineReady:
    config, dtype = model.config, dtype_name(model.placement.dtype)
    assert config.pooler is not None
    return EngineReady(
        max_model_len=max_model_len,
        block_size=0,
        num_blocks=0,
        vocab_size=config.vocab_size,
        eos_token_ids=[],
        dtype=dtype,
        kv_cache_dtype="none",
        device=platform.name,
        architecture=config.architecture,
        quantization=config.quantization.method if config.quantization else "none",
        tensor_parallel_size=tensor_parallel_size,
        pooler=config.pooler.facts,
    )


def _row(num_tokens: int) -> ScheduledRow:
    """A text of no meaning."""
    return ScheduledRow(
        request_id="warmup",
        token_ids=[0] * num_tokens,
        start=0,
        block_table=[],
        sampling_params=SamplingParams(temperature=0.0),
    )
