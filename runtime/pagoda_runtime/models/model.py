"""What the engine knows of a model that computes, whatever its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from pagoda_runtime.layers.attention import AttentionHeads
from pagoda_runtime.layers.step_input import StepInput
from pagoda_runtime.quantization.parameter import Shard


class Model(Protocol):
    """Token ids to hidden states, and hidden states to logits."""

    heads: AttentionHeads
    """Of each layer, as this rank has them."""

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens that each layer sees, itself included; 0: all."""

    @property
    def attention_scale(self) -> float:
        """Factor on q·k."""

    def weights(self) -> Mapping[str, Shard]:
        """What has to be loaded: each name in the checkpoint with what it fills."""

    @property
    def unused_weights(self) -> Sequence[str]:
        """Last parts of the names of what a checkpoint may carry and the model does not take."""

    def after_loading(self) -> None:
        """Bring every layer into the form it computes with."""

    def fix_rows(self) -> None:
        """Let the bits of a token's result not depend on how many tokens a step has; slower."""

    def add_screen(self) -> None:
        """Let `argmax` work, if it can; afterwards `can_screen` tells."""

    def set_max_model_len(self, max_model_len: int) -> None:
        """Say how long a sequence may become: the frequencies of some rope types depend on it."""

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a decode step reads."""

    @property
    def vocabulary_copies(self) -> Mapping[str, int]:
        """In what other forms the table of a tied vocabulary is held, with the bytes of each."""

    @property
    def doubling_depth(self) -> int:
        """Position whose token takes twice the multiplications of the first one."""

    def __call__(self, step: StepInput) -> torch.Tensor:
        """Hidden states before the last norm, [num_tokens, hidden_size] fp32."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, vocab_size], for the rows of `__call__`'s result that are sampled."""

    @property
    def can_screen(self) -> bool:
        """Whether `argmax` works."""

    def argmax(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows] int64: the token of each row's largest logit, found faster than all logits."""
