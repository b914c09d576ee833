"""Models whose texts are pooled: decoders and encoders without a head over the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pagoda_kernels.paged_attention import Rotary
from pagoda_runtime.layers.embedding import Embedding
from pagoda_runtime.layers.norm import Norm, add_and_norm
from pagoda_runtime.layers.step_input import StepInput
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.model import DecoderLayer, Model
from pagoda_runtime.models.pooler import Pooler
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.parameter import Shard


class PooledModel(Model):
    """Token ids to hidden states, and those of a text to its numbers."""

    def _add_head(self, placement: Placement) -> None:
        config = self.config
        assert config.pooler is not None
        self.pooler = Pooler(
            config.pooler,
            norm_eps=config.norm_eps,
            norm_bias=config.norm_bias,
            placement=placement.at("pooler"),
        )

    def weights(self) -> dict[str, Shard]:
        return {name: shard for name, shard in super().weights().items() if "/" not in name}

    @property
    def weights_beside(self) -> Mapping[str, dict[str, Shard]]:
        found: dict[str, dict[str, Shard]] = {}
        for name, shard in super().weights().items():
            folder, slash, inner = name.rpartition("/")
            if slash:
                found.setdefault(folder, {})[inner] = shard
        return found

    @property
    def vocabulary_copies(self) -> Mapping[str, int]:
        return {}

    def last_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `__call__` has left out, of any of its rows."""
        return self.norm(hidden)

    def pool(self, hidden: torch.Tensor, lens: torch.Tensor, lasts: torch.Tensor) -> torch.Tensor:
        """[num_texts, outputs] fp32 of `__call__`'s result: see `Pooler`."""
        return self.pooler(hidden, self.last_norm, lens, lasts)


class PostNormLayer(DecoderLayer):
    """Attention, add, norm; feed-forward, add, norm."""

    def __call__(
        self,
        hidden: torch.Tensor,
        normed: torch.Tensor,
        rotary: Rotary,
        step: StepInput,
        next_norm: Norm | None,
    ) -> torch.Tensor:
        """The layer's result, in the model's dtype; of normed alone, the result of the one before.

        Source: Devlin et al., BERT, 2018.
        """
        attended = self.self_attn(normed, rotary, step)
        normed = add_and_norm(normed.float(), attended, None, self.attention_norm)
        return add_and_norm(normed.float(), self.mlp(normed, step), None, self.mlp_norm)


class PostNormEncoder(PooledModel):
    """BERT and its kin: learned positions, and norms behind the sums."""

    layer_class = PostNormLayer

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__(config, placement)
        tables = config.learned_positions
        assert tables is not None
        self.first_position = tables.first
        self.position_embeddings, self.segment_embeddings = (
            Embedding(num_rows, config.hidden_size, scale=1.0, placement=self.placement)
            for num_rows in (tables.num_rows, tables.num_segments)
        )
        self.has_segments = tables.num_segments > 1

    def __call__(self, step: StepInput) -> torch.Tensor:
        """The last layer's result, [num_tokens, hidden_size] fp32."""
        segments = step.segments
        if segments is None or not self.has_segments:
            segments = torch.zeros_like(step.positions)
        hidden = self.embed_tokens(step.token_ids)
        hidden += self.position_embeddings(step.positions + self.first_position)
        hidden += self.segment_embeddings(segments)
        normed = self.norm(hidden)
        nothing = hidden.new_empty(len(hidden), 1, 0)
        for layer in self.layers:
            normed = layer(hidden, normed, Rotary(nothing, nothing), step, None)
        return normed.float()

    def last_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden
