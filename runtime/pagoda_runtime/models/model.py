"""The model: one decoder for all families, which differ in the values of ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch

from pagoda_kernels.grouped_linear import holds_own_bits
from pagoda_kernels.paged_attention import Rotary
from pagoda_kernels.rotary import rotary
from pagoda_runtime.ipc.messages import NEVER
from pagoda_runtime.layers.attention import AttentionHeads, QKNorm, SelfAttention
from pagoda_runtime.layers.embedding import Embedding, LanguageModelHead
from pagoda_runtime.layers.mlp import MLP
from pagoda_runtime.layers.module import Module
from pagoda_runtime.layers.norm import LayerNorm, Norm, RMSNorm, add_and_norm
from pagoda_runtime.layers.rotary import inverse_frequencies
from pagoda_runtime.layers.step_input import StepInput
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.parameter import Shard


class DecoderLayer(Module):
    """Norm, attention, add; norm, feed-forward, add; with sandwich norms before each add too."""

    def __init__(self, config: ModelConfig, layer: int, placement: Placement) -> None:
        super().__init__()
        heads = _heads_of(config)
        qk_norm = None
        if config.qk_norm:
            share = config.rope[layer].partial_rotary_factor
            qk_norm = QKNorm(
                heads,
                rotary_dim=int(heads.head_dim * share),
                eps=config.norm_eps,
                weight_offset=config.norm_weight_offset,
                placement=placement,
            )
        self.attention_norm = _make_norm(config, placement)
        self.self_attn = SelfAttention(
            config.hidden_size,
            heads,
            layer=layer,
            sees_all=not config.sliding_windows[layer],
            biases=(config.qkv_bias, config.attention_output_bias),
            qk_norm=qk_norm,
            placement=placement.at("self_attn"),
        )
        self.mlp_norm = _make_norm(config, placement)
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            is_gated=config.is_gated,
            bias=config.mlp_bias,
            placement=placement.at("mlp"),
        )
        self.after_attention_norm = _make_norm(config, placement) if config.sandwich_norms else None
        self.after_mlp_norm = _make_norm(config, placement) if config.sandwich_norms else None

    def __call__(
        self,
        hidden: torch.Tensor,
        normed: torch.Tensor,
        rotary: Rotary,
        step: StepInput,
        next_norm: Norm | None,
    ) -> torch.Tensor:
        """Add this layer's two parts to hidden, [num_tokens, hidden_size] fp32, in place.

        Args:
            normed: attention_norm(hidden), from where hidden was last added to.
            next_norm: of the layer that follows; None: of none.
        Returns: next_norm(hidden), or hidden.
        """
        attended = self.self_attn(normed, rotary, step)
        normed = add_and_norm(hidden, attended, self.after_attention_norm, self.mlp_norm)
        return add_and_norm(hidden, self.mlp(normed, step), self.after_mlp_norm, next_norm)


class Model(Module):
    """Token ids to hidden states, and hidden states to logits: embedding, layers, norm and head."""

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        placement = replace(placement, stored_name=config.stored_name)
        self.config, self.placement = config, placement
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, scale=config.embedding_scale, placement=placement
        )
        self.layers = [
            self.layer_class(config, layer, placement.at(f"layers.{layer}"))
            for layer in range(config.num_layers)
        ]
        self.norm = _make_norm(config, placement)
        self._add_head(placement)
        self.set_max_model_len(config.max_position_embeddings)

    def _add_head(self, placement: Placement) -> None:
        config = self.config
        self.lm_head = LanguageModelHead(
            config.vocab_size,
            config.hidden_size,
            tied_to=self.embed_tokens if config.tie_word_embeddings else None,
            # Else the table serves for products too.
            is_stored=config.has_tied_head
            and holds_own_bits(8, dtype=placement.dtype, device=placement.device),
            placement=placement.at("lm_head"),
        )

    @property
    def heads(self) -> AttentionHeads:
        """Of each layer, as this rank has them."""
        return _heads_of(self.config).share(self.placement.parallel)

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
            heads = map(self.config.stored_name, ("lm_head.weight", "lm_head.qweight"))
            return (*computed, *heads)
        return computed

    @property
    def weights_beside(self) -> Mapping[str, dict[str, Shard]]:
        """What has to be loaded from folders within the model's: folder → name → what it fills."""
        return {}

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
    def vocabulary_copies(self) -> Mapping[str, int]:
        """In what other forms the table of a tied vocabulary is held, with the bytes of each."""
        return self.lm_head.copies

    def set_max_model_len(self, max_model_len: int) -> None:
        """Say how long a sequence may become: the frequencies of some rope types depend on it."""
        head_dim = self.config.head_dim
        self.frequencies = {
            rope: inverse_frequencies(rope, head_dim, max_model_len).to(self.placement.device)
            for rope in self.config.rope
        }

    def __call__(self, step: StepInput) -> torch.Tensor:
        """Hidden states before the last norm, [num_tokens, hidden_size] fp32."""
        rotaries = {
            rope: Rotary(*rotary(step.positions, frequencies, rope.attention_factor))
            for rope, frequencies in self.frequencies.items()
        }
        hidden = self.embed_tokens(step.token_ids)
        first_norm, *next_norms = [layer.attention_norm for layer in self.layers]
        normed = first_norm(hidden)
        if self.config.embeddings_are_normed:
            hidden = normed.float()
        # The last norm is of the rows that are sampled: see `logits`.
        steps = zip(self.layers, self.config.rope, [*next_norms, None], strict=True)
        for layer, rope, next_norm in steps:
            normed = layer(hidden, normed, rotaries[rope], step, next_norm)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, vocab_size], for the rows of `__call__`'s result that are sampled."""
        return self.lm_head(self.norm(hidden))

    def argmax(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[num_rows] int64: the token of each row's largest logit, found faster than all logits and
        more exactly; None where the model cannot.
        """
        find = self.lm_head.argmax
        return None if find is None else find(self.norm(hidden))


def _heads_of(config: ModelConfig) -> AttentionHeads:
    """Of each layer, as all ranks together have them."""
    return AttentionHeads(config.num_heads, config.num_kv_heads, config.head_dim)


def _make_norm(config: ModelConfig, placement: Placement) -> Norm:
    size, eps = config.hidden_size, config.norm_eps
    if config.norm == "layer":
        return LayerNorm(size, eps=eps, has_bias=config.norm_bias, placement=placement)
    return RMSNorm(size, eps=eps, weight_offset=config.norm_weight_offset, placement=placement)
