"""What steps need of a device's memory beside weights and cache: measured where that can be."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import torch

from pagoda_kernels.paged_attention import AttentionBackend
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.decode_steps import graph_sizes
from pagoda_runtime.execution.memory import format_bytes, must_fit
from pagoda_runtime.execution.steps import StepRunner
from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.models.model import Model
from pagoda_runtime.platforms import Platform
from pagoda_runtime.sampling_params import MAX_LOGPROBS, SamplingParams

logger = logging.getLogger(__name__)

# All of them take memory of their own in a step's sampling.
_COSTLY = SamplingParams(
    temperature=0.9,
    top_p=0.9,
    top_k=100,
    min_p=0.001,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    repetition_penalty=1.1,
    logprobs=MAX_LOGPROBS,
)


def find_step_bytes(
    config: EngineConfig, model: Model, attention: AttentionBackend, platform: Platform
) -> int:
    """What the largest step and the graphs take; 0 where the platform measures nothing.

    Afterwards the attention has to be allocated anew.
    Raises: FatalError: the platform's out_of_memory.
    """
    limit = model.config.max_position_embeddings
    max_model_len = min(config.max_model_len or limit, limit)
    trial: list[StepRunner] = []

    def run_largest_steps() -> None:
        # Block 0, which all rows write to.
        attention.allocate(1)
        runner = StepRunner(
            model,
            attention,
            platform,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
        )
        for rows in largest_steps(config, attention.spec.block_size, max_model_len):
            runner.execute(rows)
        trial.append(runner)

    what = (
        f"The weights, and a step of {config.max_num_batched_tokens} tokens and "
        f"{config.max_num_seqs} sequences, do"
    )
    remedy = (
        "Lower --max-num-batched-tokens or --max-num-seqs (engine.maxNumSeqs), or use a larger "
        "device."
    )
    with torch.inference_mode(), must_fit(platform, what, remedy):
        use = platform.measure(run_largest_steps)
        if use is None:
            return 0
        graph_bytes = 0 if config.enforce_eager else _measure_graphs(trial.pop(), platform)
    step, graphs = format_bytes(use.peak_bytes), format_bytes(graph_bytes)
    logger.info("The largest step takes %s, graphs %s", step, graphs)
    return use.peak_bytes + graph_bytes


def _measure_graphs(runner: StepRunner, platform: Platform) -> int:
    """What graphs of all sizes take, from the two largest: the others fit into their memory."""
    record, steps = platform.recorder(), runner.decode_steps
    assert record is not None
    assert steps is not None
    sizes = graph_sizes(runner.row_tables.padding_place)
    kept = []
    for size in sizes[:-3:-1]:
        use = platform.measure(partial(steps.record, record, [size]))
        assert use is not None
        kept.append(use.kept_bytes)
    return sum(kept) + (len(sizes) - len(kept)) * kept[-1]


def largest_steps(
    config: EngineConfig, block_size: int, max_model_len: int
) -> tuple[list[ScheduledRow], list[ScheduledRow]]:
    """A step of as many prompt tokens, and one of as long contexts, as there can be."""
    assert config.max_num_batched_tokens is not None
    num_rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    first = min(config.max_num_batched_tokens - num_rows + 1, max_model_len)
    counts = np.full(num_rows, first)
    if num_rows > 1:
        left = min(config.max_num_batched_tokens, num_rows * max_model_len) - first
        counts[1:] = left // (num_rows - 1)
        counts[1 : 1 + left % (num_rows - 1)] += 1

    def make_row(number: int, start: int, num_tokens: int) -> ScheduledRow:
        return ScheduledRow(
            request_id=f"largest {number}",
            token_ids=[0] * num_tokens,
            start=start,
            block_table=[0] * -(-(start + num_tokens) // block_size),
            sampling_params=_COSTLY,
            history=[0],
            prompt_targets=[0] * (num_tokens - 1),
            num_prompt_logprobs=MAX_LOGPROBS,
        )

    prompts = [make_row(number, 0, count) for number, count in enumerate(counts.tolist())]
    return prompts, [make_row(number, max_model_len - 1, 1) for number in range(num_rows)]
