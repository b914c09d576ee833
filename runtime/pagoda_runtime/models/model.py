"""What the engine knows of a model that computes, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from pagoda_runtime.ipc.messages import NEVER
from pagoda_runtime.layers.attention import AttentionHeads
from pagoda_runtime.layers.module import Module
from pagoda_runtime.layers.step_input import StepInput
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.parameter import Shard


def heads_of(config: ModelConfig) -> AttentionHeads:
    """Of each layer, as all ranks together have them."""
    return AttentionHeads(config.num_heads, config.num_kv_heads, config.head_dim)


class Model(Module, ABC):
    """Token ids to hidden states, and hidden states to logits."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        self.config, self.placement = config, placement

    @property
    def heads(self) -> AttentionHeads:
        """Of each layer, as this rank has them."""
        return heads_of(self.config).share(self.placement.parallel)

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens that each layer sees, itself included; 0: all."""
        return self.config.sliding_windows

    @property
    def attention_scale(self) -> float:
        """Factor on q·k."""
        return self.config.attention_scale or self.config.head_dim**-0.5

    def weights(self) -> dict[str, Shard]:
        """What has to be loaded: each name in the checkpoint with what it fills."""
        return {self.config.stored_name(name): shard for name, shard in self.shards()}

    @property
    def unused_weights(self) -> tuple[str, ...]:
        """Last parts of the names of what a checkpoint may carry and the model does not take."""
        computed = self.config.computed_weights
        if self.config.tie_word_embeddings:
            return (*computed, self.config.stored_name("lm_head.weight"))
        return computed

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a decode step reads."""
        return sum(module.bytes_per_step for module in self.modules())

    @property
    def doubling_depth(self) -> int:
        """Position whose token takes twice the multiplications of the first one."""
        modules = list(self.modules())
        earlier = sum(module.multiplications_per_earlier_token for module in modules)
        if not earlier:
            return NEVER
        return sum(module.multiplications_per_token for module in modules) // earlier

    @property
    @abstractmethod
    def vocabulary_copies(self) -> Mapping[str, int]:
        """In what other forms the table of a tied vocabulary is held, with the bytes of each."""

    @abstractmethod
    def set_max_model_len(self, max_model_len: int) -> None:
        """Say how long a sequence may become: the frequencies of some rope types depend on it."""

    @abstractmethod
    def __call__(self, step: StepInput) -> torch.Tensor:
        """Hidden states before the last norm, [num_tokens, hidden_size] fp32."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, vocab_size], for the rows of `__call__`'s result that are sampled."""

    def argmax(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[num_rows] int64: the token of each row's largest logit, found faster than all logits and
        more exactly; None where the model cannot.
        """
        return None
