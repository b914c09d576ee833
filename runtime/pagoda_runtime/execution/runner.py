"""Run the scheduler's steps on a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.loading import load_model, timed
from pagoda_runtime.execution.logprobs import compute_logprobs
from pagoda_runtime.execution.memory import allocate, fit_kv_cache, make_attention
from pagoda_runtime.execution.sampler import sample_hidden
from pagoda_runtime.execution.step_input import prepare_step
from pagoda_runtime.ipc.messages import (
    BlockCopy,
    EngineReady,
    RowOutput,
    ScheduledRow,
    TokenLogprobs,
)
from pagoda_runtime.models.source import OnProgress
from pagoda_runtime.parallel import ALONE, TensorParallel
from pagoda_runtime.platforms import choose_platform
from pagoda_runtime.sampling_params import SamplingParams

_NOTHING = RowOutput()
# Rows of a prompt whose logits are computed at once for prompt_logprobs.
_PROMPT_LOGPROBS_ROWS = 64


def no_progress(phase: str, percent: float, bytes_per_second: float) -> None:
    """The listener of those who do not care."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step whose outputs are there."""

    outputs: list[RowOutput]

    def result(self) -> list[RowOutput]:
        return self.outputs


class ModelRunner:
    """A loaded model with its KV cache.

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
        assert parallel.size == config.tensor_parallel_size
        platform = choose_platform(config.device)
        platform.verify(config)
        platform.configure(config, parallel.rank)
        config = platform.complete(config)
        self.model = load_model(config, platform, parallel, on_progress)
        self.model_config = self.model.config
        self.samples_in_batch = platform.samples_in_batch
        self.attention = make_attention(config, self.model)
        size = fit_kv_cache(config, self.model_config, self.attention, platform, parallel)
        self.num_blocks, self.block_size = size.num_blocks, size.block_size
        self.max_model_len = size.max_model_len
        self.model.set_max_model_len(size.max_model_len)
        with torch.inference_mode():
            allocate(self.attention, size, platform)
        on_progress("warmup", 0.0, 0.0)
        with timed("Warming up"):
            self._warm_up()
        on_progress("warmup", 100.0, 0.0)
        windows = self.model.windows
        self.ready_facts = EngineReady(
            max_model_len=size.max_model_len,
            block_size=size.block_size,
            num_blocks=size.num_blocks,
            vocab_size=self.model_config.vocab_size,
            sliding_window=0 if 0 in windows else max(windows),
            doubling_depth=self.model.doubling_depth,
            eos_token_ids=list(self.model_config.eos_token_ids),
            dtype=str(self.model.placement.dtype).removeprefix("torch."),
            device=platform.name,
            tensor_parallel_size=parallel.size,
            default_sampling=dict(self.model_config.default_sampling),
        )

    def execute(
        self, rows: Sequence[ScheduledRow], copies: Sequence[BlockCopy] = ()
    ) -> list[RowOutput]:
        """What each row asked for: a step from begin to end."""
        return self.submit(rows, copies).result()

    @torch.inference_mode()
    def submit(self, rows: Sequence[ScheduledRow], copies: Sequence[BlockCopy] = ()) -> StepDone:
        """Copy blocks, compute the rows' tokens, and what each row asks for.

        Afterwards the cache holds each row's positions 0 … start + len(token_ids) - 1.
        """
        if copies:
            self.attention.copy_blocks(
                [copy.source for copy in copies], [copy.target for copy in copies]
            )
        prepared = prepare_step(rows, self.attention)
        hidden = self.model(prepared.step_input)
        outputs = [_NOTHING] * len(rows)
        if prepared.sampled_rows:
            sampled = [rows[index] for index in prepared.sampled_rows]
            chosen = sample_hidden(
                self.model,
                hidden.index_select(0, prepared.sampled_tokens),
                sampled,
                self.model_config.eos_token_ids,
                in_batch=self.samples_in_batch,
            )
            for index, output in zip(prepared.sampled_rows, chosen, strict=True):
                outputs[index] = output
        for index, row in enumerate(rows):
            if row.prompt_targets:
                first = prepared.first_tokens[index]
                outputs[index] = msgspec.structs.replace(
                    outputs[index], prompt_logprobs=self._prompt_logprobs(hidden[first:], row)
                )
        return StepDone(outputs)

    def _prompt_logprobs(self, hidden: torch.Tensor, row: ScheduledRow) -> list[TokenLogprobs]:
        """Logprobs of row.prompt_targets, the first of which follows the first row of hidden."""
        targets = row.prompt_targets
        assert targets is not None
        found: list[TokenLogprobs] = []
        # In pieces: fp32 logits of a whole prompt would be larger than the model.
        for first in range(0, len(targets), _PROMPT_LOGPROBS_ROWS):
            some = targets[first : first + _PROMPT_LOGPROBS_ROWS]
            logits = self.model.logits(hidden[first : first + len(some)])
            found += compute_logprobs(
                logits, some, row.num_prompt_logprobs, in_batch=self.samples_in_batch
            )
        return found

    def _warm_up(self) -> None:
        """Run one prefill and one decode step, so that the first request pays for no set-up."""
        num_tokens = min(self.block_size, self.max_model_len - 1)
        params = SamplingParams(temperature=0.0)
        for start, token_ids in ((0, [0] * num_tokens), (num_tokens, [0])):
            num_blocks = -(-(start + len(token_ids)) // self.block_size)
            self.submit(
                [
                    ScheduledRow(
                        request_id="warmup",
                        token_ids=token_ids,
                        start=start,
                        # Block 0 holds padding: nothing of the warm-up can be seen by a request.
                        block_table=[0] * num_blocks,
                        sampling_params=params,
                    )
                ]
            ).result()
