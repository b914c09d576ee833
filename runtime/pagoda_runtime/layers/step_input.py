"""What a model is given for one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagoda_kernels.paged_attention import AttentionPlan


@dataclass(frozen=True, slots=True)
class StepInput:
    """The tokens of one step, those of each sequence one after the other.

    token_ids, positions: [num_tokens] int64.
    attention: what the layers' attention is asked of.
    segments: [num_tokens] int64, 0 or 1: which text of a pair a token is of; None where no model
        of the engine's kind asks.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionPlan
    segments: torch.Tensor | None = None
