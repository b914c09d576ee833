"""Run steps on a model and its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import torch

from pagoda_kernels.paged_attention import AttentionBackend
from pagoda_runtime.execution.batch_sampler import start_batch
from pagoda_runtime.execution.decode_steps import DecodeSteps, is_decode_step
from pagoda_runtime.execution.logprobs import start_logprobs
from pagoda_runtime.execution.row_tables import RowTables
from pagoda_runtime.execution.sampler import sample_hidden
from pagoda_runtime.execution.step_input import PreparedStep, prepare_step
from pagoda_runtime.ipc.messages import (
    BlockCopy,
    Masks,
    RowOutput,
    ScheduledRow,
    TokenLogprobs,
    with_masks,
)
from pagoda_runtime.models.model import Model
from pagoda_runtime.platforms import Platform

_NOTHING = RowOutput()
# Rows of a prompt whose logits are computed at once for prompt_logprobs.
_PROMPT_LOGPROBS_ROWS = 64


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that a device may still be computing."""

    num_rows: int
    sampled_rows: Sequence[int]
    tell: Callable[[], list[RowOutput]]
    """Waits for the outputs of these rows."""
    prompts: Sequence[tuple[int, list[Callable[[], list[TokenLogprobs]]]]]
    """Rows, each with the logprobs of its prompt, piece by piece."""

    @torch.inference_mode()
    def result(self) -> list[RowOutput]:
        """Wait for what each row asked for."""
        outputs = [_NOTHING] * self.num_rows
        for index, output in zip(self.sampled_rows, self.tell(), strict=True):
            outputs[index] = output
        for index, pieces in self.prompts:
            told = [token for tell in pieces for token in tell()]
            outputs[index] = msgspec.structs.replace(outputs[index], prompt_logprobs=told)
        return outputs


class StepRunner:
    """Computes steps, one after the other.

    Args:
        attention: with room for the blocks of the rows to come.
        max_num_seqs: rows of a step at most.
        max_model_len: tokens of a row at most.
    """

    def __init__(
        self,
        model: Model,
        attention: AttentionBackend,
        platform: Platform,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self.model, self.attention, self.platform = model, attention, platform
        num_columns = -(-max_model_len // attention.spec.block_size)
        self.row_tables = RowTables(max_num_seqs, num_columns)
        self.last_tokens: torch.Tensor | None = None
        self.decode_steps: DecodeSteps | None = None
        if platform.is_asynchronous:
            self.decode_steps = DecodeSteps(model, attention, self.row_tables)
            self.last_tokens = self.decode_steps.last_tokens

    @torch.inference_mode()
    def record_graphs(self) -> None:
        """Record decode steps where the platform can replay them."""
        record = self.platform.recorder()
        if record is not None and self.decode_steps is not None:
            self.decode_steps.record(record)

    def execute(
        self, rows: Sequence[ScheduledRow], copies: Sequence[BlockCopy] = ()
    ) -> list[RowOutput]:
        """What each row asked for: a step from begin to end."""
        return self.submit(rows, copies).result()

    @torch.inference_mode()
    def submit(
        self,
        rows: Sequence[ScheduledRow],
        copies: Sequence[BlockCopy] = (),
        masks: Masks | None = None,
    ) -> RunningStep:
        """Copy blocks, compute the rows' tokens, and what each row asks for.

        On a platform that is asynchronous this is only begun, and a row's last token may be one
        that the step before is still computing. Masks are waited for once the model
        is called. Afterwards the cache holds each row's positions 0 … start + len(token_ids) - 1.
        """
        if copies:
            self.attention.copy_blocks(
                [copy.source for copy in copies], [copy.target for copy in copies]
            )
        if self.decode_steps is not None and is_decode_step(rows):
            logits = self.decode_steps.run(rows)
            rows = with_masks(rows, masks)
            batch = start_batch(logits, rows, self.model.config.eos_token_ids)
            self.decode_steps.last_tokens[: len(rows)].copy_(batch.token_ids)
            return RunningStep(len(rows), range(len(rows)), batch.tell, ())
        prepared = prepare_step(rows, self.row_tables, self.attention, self.last_tokens)
        hidden = self.model(prepared.step_input)
        tell: Callable[[], list[RowOutput]] = list
        if prepared.sampled_rows:
            some = with_masks([rows[index] for index in prepared.sampled_rows], masks)
            tell = self._sample(hidden, some, prepared)
        prompts = [
            (index, list(self._prompt_logprobs(hidden[first:], row)))
            for index, (row, first) in enumerate(zip(rows, prepared.first_tokens, strict=True))
            if row.prompt_targets
        ]
        return RunningStep(len(rows), prepared.sampled_rows, tell, prompts)

    def _sample(
        self, hidden: torch.Tensor, some: Sequence[ScheduledRow], prepared: PreparedStep
    ) -> Callable[[], list[RowOutput]]:
        hidden = hidden.index_select(0, prepared.sampled_tokens)
        eos_token_ids = self.model.config.eos_token_ids
        if self.last_tokens is None:
            outputs = sample_hidden(self.model, hidden, some, eos_token_ids)
            return lambda: outputs
        batch = start_batch(self.model.logits(hidden), some, eos_token_ids)
        self.last_tokens.index_copy_(0, prepared.sampled_rows_on_device, batch.token_ids)
        return batch.tell

    def _prompt_logprobs(
        self, hidden: torch.Tensor, row: ScheduledRow
    ) -> Iterator[Callable[[], list[TokenLogprobs]]]:
        """Of row.prompt_targets, the first of which follows the first row of hidden."""
        targets = row.prompt_targets
        assert targets is not None
        # In pieces: fp32 logits of a whole prompt would be larger than the model.
        for first in range(0, len(targets), _PROMPT_LOGPROBS_ROWS):
            some = targets[first : first + _PROMPT_LOGPROBS_ROWS]
            yield start_logprobs(
                self.model.logits(hidden[first : first + len(some)]),
                some,
                row.num_prompt_logprobs,
                in_batch=self.platform.is_asynchronous,
            )
