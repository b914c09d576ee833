"""The decoder: one for all families, which differ in the values of ModelConfig."""

from __future__ import annotations

import torch

from pagoda_kernels.paged_attention import Rotary
from pagoda_runtime.layers.attention import SelfAttention
from pagoda_runtime.layers.embedding import Embedding, LanguageModelHead
from pagoda_runtime.layers.mlp import GatedMLP
from pagoda_runtime.layers.norm import RMSNorm
from pagoda_runtime.layers.rotary import inverse_frequencies, rotary_of
from pagoda_runtime.layers.step_input import StepInput
from pagoda_runtime.models.config import ModelConfig


class DecoderLayer:
    """Norm, attention, add; norm, feed-forward, add; with sandwich norms before each add too."""

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.self_attn = SelfAttention(config, layer, dtype=dtype, device=device)
        self.mlp = GatedMLP(config, dtype=dtype, device=device)
        self.attention_norm = make_norm(config, dtype, device)
        self.mlp_norm = make_norm(config, dtype, device)
        self.after_attention_norm: RMSNorm | None = None
        self.after_mlp_norm: RMSNorm | None = None
        if config.sandwich_norms:
            self.after_attention_norm = make_norm(config, dtype, device)
            self.after_mlp_norm = make_norm(config, dtype, device)

    def targets(self, prefix: str) -> dict[str, torch.Tensor]:
        norms = {"input_layernorm": self.attention_norm, "post_attention_layernorm": self.mlp_norm}
        if self.after_attention_norm is not None and self.after_mlp_norm is not None:
            # With sandwich norms post_attention_layernorm is what its name says.
            norms = {
                "input_layernorm": self.attention_norm,
                "post_attention_layernorm": self.after_attention_norm,
                "pre_feedforward_layernorm": self.mlp_norm,
                "post_feedforward_layernorm": self.after_mlp_norm,
            }
        return (
            self.self_attn.targets(f"{prefix}self_attn.")
            | self.mlp.targets(f"{prefix}mlp.")
            | {f"{prefix}{name}.weight": norm.weight for name, norm in norms.items()}
        )

    def after_loading(self) -> None:
        self.self_attn.after_loading()
        self.mlp.after_loading()
        for norm in (
            self.attention_norm,
            self.mlp_norm,
            self.after_attention_norm,
            self.after_mlp_norm,
        ):
            if norm is not None:
                norm.after_loading()

    def __call__(self, hidden: torch.Tensor, rotary: Rotary, step: StepInput) -> None:
        """Add this layer's two parts to hidden, [num_tokens, hidden_size] fp32, in place."""
        attended = self.self_attn(self.attention_norm(hidden), rotary, step)
        _add(hidden, attended, self.after_attention_norm)
        _add(hidden, self.mlp(self.mlp_norm(hidden)), self.after_mlp_norm)


class Decoder:
    """Token ids to hidden states, and hidden states to logits."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            scale=config.embedding_scale,
            dtype=dtype,
            device=device,
        )
        self.layers = [
            DecoderLayer(config, layer, dtype=dtype, device=device)
            for layer in range(config.num_layers)
        ]
        self.norm = make_norm(config, dtype, device)
        self.lm_head = LanguageModelHead(
            config.vocab_size,
            config.hidden_size,
            tied_to=self.embed_tokens if config.tie_word_embeddings else None,
            dtype=dtype,
            device=device,
        )
        self.device = device
        self.set_max_model_len(config.max_position_embeddings)

    def set_max_model_len(self, max_model_len: int) -> None:
        """Say how long a sequence may become: the frequencies of some rope types depend on it."""
        head_dim = self.config.head_dim
        self.frequencies = {
            rope: inverse_frequencies(rope, head_dim, max_model_len).to(self.device)
            for rope in self.config.rope
        }

    def targets(self) -> dict[str, torch.Tensor]:
        """Where each tensor of the checkpoint goes: its name → a view of a parameter."""
        targets = {
            "model.embed_tokens.weight": self.embed_tokens.weight,
            "model.norm.weight": self.norm.weight,
        }
        if not self.lm_head.is_tied:
            targets["lm_head.weight"] = self.lm_head.weight
        for index, layer in enumerate(self.layers):
            targets |= layer.targets(f"model.layers.{index}.")
        return targets

    def after_loading(self) -> None:
        """Bring every layer into the form it computes with."""
        for layer in self.layers:
            layer.after_loading()
        self.norm.after_loading()
        self.lm_head.after_loading()

    def add_screen(self) -> None:
        """Let `likeliest` work, if it can; afterwards `can_screen` tells."""
        self.lm_head.add_screen()

    def fix_rows(self) -> None:
        """Let the bits of a token's result not depend on how many tokens a step has; slower."""
        for layer in self.layers:
            layer.self_attn.fix_rows()
            layer.mlp.fix_rows()
        self.lm_head.fix_rows()

    def __call__(self, step: StepInput) -> torch.Tensor:
        """Hidden states before the last norm, [num_tokens, hidden_size] fp32."""
        rotaries = {
            rope: rotary_of(step.positions, frequencies, rope.attention_factor)
            for rope, frequencies in self.frequencies.items()
        }
        hidden = self.embed_tokens(step.token_ids)
        for layer, rope in zip(self.layers, self.config.rope, strict=True):
            layer(hidden, rotaries[rope], step)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, vocab_size], for the rows of `__call__`'s result that are sampled."""
        return self.lm_head(self.norm(hidden))

    @property
    def can_screen(self) -> bool:
        """Whether `likeliest` works."""
        return self.lm_head.screen is not None

    def likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows] int64: the token of each row's largest logit, found faster than all logits."""
        assert self.lm_head.screen is not None
        return self.lm_head.screen.argmax(self.norm(hidden))


def _add(hidden: torch.Tensor, part: torch.Tensor, norm: RMSNorm | None) -> None:
    """Sums stay in fp32: adding to them in bf16 would round each time and cost a cast."""
    if norm is None:
        hidden.add_(part)
    else:
        norm.add_to(hidden, part)


def make_norm(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> RMSNorm:
    return RMSNorm(
        config.hidden_size,
        eps=config.norm_eps,
        weight_offset=config.norm_weight_offset,
        dtype=dtype,
        device=device,
    )
