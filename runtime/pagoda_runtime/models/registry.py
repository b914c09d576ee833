"""The architectures that are served, and the way from a model folder to its config and model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.bert import bert, bert_head, roberta, roberta_head
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.gemma3 import gemma3
from pagoda_runtime.models.generation import read_generation
from pagoda_runtime.models.llama import llama
from pagoda_runtime.models.mistral import mistral
from pagoda_runtime.models.modernbert import modernbert, modernbert_head
from pagoda_runtime.models.pooler_config import (
    PoolerConfig,
    PoolerLayer,
    is_embedder,
    num_labels,
    read_classifier,
    read_embedder,
    read_max_seq_length,
)
from pagoda_runtime.models.qwen2 import qwen2
from pagoda_runtime.models.qwen3 import qwen3
from pagoda_runtime.quantization.config import read_quantization

if TYPE_CHECKING:
    from pagoda_runtime.models.model import Model
    from pagoda_runtime.quantization.base import Placement

Family = Callable[[ConfigFile], ModelConfig]
Head = Callable[[ConfigFile, ModelConfig], tuple[str, tuple[PoolerLayer, ...]]]
"""Of a classifier: how it pools, and the layers that follow."""

ARCHITECTURES: Mapping[str, Family] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Gemma3ForCausalLM": gemma3,
}
"""Those that generate; with a modules.json they embed."""


def _score(file: ConfigFile, config: ModelConfig) -> tuple[str, tuple[PoolerLayer, ...]]:
    """A decoder's head as a classifier."""
    return "last", (PoolerLayer("score", config.hidden_size, num_labels(file), has_bias=False),)


def _without_head(family: Family) -> Family:
    """A decoder whose texts are pooled."""

    def read(file: ConfigFile) -> ModelConfig:
        config = family(file)
        names = {part: name.removeprefix("model.") for part, name in config.names.items()}
        return replace(config, names=names, prefix="model.", tie_word_embeddings=True)

    return read


@dataclass(frozen=True, slots=True)
class _Pooled:
    family: Family
    head: Head
    default_pooling: str


_FAMILIES: Mapping[str, _Pooled] = {
    "Bert": _Pooled(bert, bert_head, "mean"),
    "Roberta": _Pooled(roberta, roberta_head, "mean"),
    "XLMRoberta": _Pooled(roberta, roberta_head, "mean"),
    "ModernBert": _Pooled(modernbert, modernbert_head, "mean"),
    "Llama": _Pooled(_without_head(llama), _score, "last"),
    "Mistral": _Pooled(_without_head(mistral), _score, "last"),
    "Qwen2": _Pooled(_without_head(qwen2), _score, "last"),
    "Qwen3": _Pooled(_without_head(qwen3), _score, "last"),
    "Gemma3": _Pooled(_without_head(gemma3), _score, "last"),
    "Gemma3Text": _Pooled(_without_head(gemma3), _score, "last"),
}
EMBEDDERS = {
    f"{name}{kind}": pooled
    for name, pooled in _FAMILIES.items()
    for kind in ("Model", "ForMaskedLM", "ForCausalLM")
}
CLASSIFIERS = {f"{name}ForSequenceClassification": pooled for name, pooled in _FAMILIES.items()}


def make_model(config: ModelConfig, placement: Placement) -> Model:
    """The model of a config, its weights not yet loaded."""
    # Not above: who only reads configs needs no torch.
    from pagoda_runtime.models.model import Model
    from pagoda_runtime.models.pooled import PooledModel, PostNormEncoder

    if config.pooler is None:
        return Model(config, placement)
    kind = PooledModel if config.learned_positions is None else PostNormEncoder
    return kind(config, placement)


def load_model_config(
    folder: Path, *, quantization: str | None = None, generation_config: str = "auto"
) -> ModelConfig:
    """Read config.json and, if there are any, the files beside it that say what the model is for.

    Args:
        quantization: what the flag --quantization says, or None.
        generation_config: what the flag --generation-config says: auto or none.
    Raises: FatalError: ModelNotFound, ModelAccessDenied, InvalidModelConfig,
        UnsupportedArchitecture or QuantizationMismatch.
    """
    file = ConfigFile.read(folder / "config.json")
    stored = read_quantization(file, quantization)
    architectures = file.values.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise file.invalid("architectures", architectures, "a list with the name of a class")
    for name in architectures:
        if name in ARCHITECTURES and not is_embedder(folder):
            config = replace(ARCHITECTURES[name](file), quantization=stored)
            if not config.is_causal:
                raise file.invalid("use_bidirectional_attention", True, "false: it generates")
            return read_generation(config, file, uses_defaults=generation_config == "auto")
        if name in CLASSIFIERS or name in EMBEDDERS:
            return replace(_read_pooled(name, file, folder), quantization=stored)
    raise FatalError(
        "UnsupportedArchitecture",
        f"{file.path}: the architecture {architectures[0]} is not supported. "
        f"Supported: {', '.join(ARCHITECTURES)}; *Model and *ForSequenceClassification of "
        f"{', '.join(_FAMILIES)}. Serve a model of one of these.",
    )


def _read_pooled(name: str, file: ConfigFile, folder: Path) -> ModelConfig:
    """The config of a model that embeds or classifies."""
    pooler: PoolerConfig
    if (pooled := CLASSIFIERS.get(name)) is not None:
        config = pooled.family(file)
        pooler = read_classifier(file, *pooled.head(file, config))
    else:
        pooled = EMBEDDERS[name]
        config = pooled.family(file)
        pooler = read_embedder(file, folder, config.hidden_size, pooled.default_pooling)
    names = dict(config.names)
    for index, layer in enumerate(pooler.layers):
        names[f"pooler.layers.{index}"] = layer.name
        if layer.norm:
            names[f"pooler.layers.{index}.norm"] = layer.norm
    limit = min(config.max_position_embeddings, read_max_seq_length(folder) or 2**31)
    return replace(
        config, architecture=name, names=names, pooler=pooler, max_position_embeddings=limit
    )
