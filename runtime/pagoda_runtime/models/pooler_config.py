"""What a checkpoint makes of a text's hidden states, read from its files: a vector, or classes.

Embedding models have files of sentence-transformers beside config.json: modules.json names what
follows the model (1_Pooling, 2_Dense, 3_Normalize), config_sentence_transformers.json the prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pagoda_runtime.config_file import ConfigFile, read_text
from pagoda_runtime.errors import FatalError
from pagoda_runtime.ipc.messages import PoolerFacts, ScoreActivation

A = TypeVar("A", bound=str)

POOLINGS: Mapping[str, str] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
"""sentence-transformers' name → ours."""
_OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
# By the last part of a torch class's name.
_OF_LOGITS: dict[str, ScoreActivation] = {
    "Identity": "identity",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Softmax": "softmax",
}
_OF_LAYERS = {
    "Identity": "identity",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "GELU": "gelu",
    "ReLU": "relu",
    "SiLU": "silu",
}


@dataclass(frozen=True, slots=True)
class PoolerLayer:
    """activation(x @ weight.T + bias), and perhaps a norm of that.

    name: the checkpoint's, of the module; what stands before a slash is a folder with weights of
        its own.
    norm: the checkpoint's name of the norm; "": none.
    """

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    activation: str = "identity"
    norm: str = ""


@dataclass(frozen=True, slots=True)
class PoolerConfig:
    """From a text's hidden states to numbers."""

    pooling: str
    """cls: the first token's, last: the last one's, mean: of all."""
    layers: tuple[PoolerLayer, ...]
    """Applied to the pooled state, in order."""
    facts: PoolerFacts


def read_embedder(
    file: ConfigFile, folder: Path, hidden_size: int, default_pooling: str
) -> PoolerConfig:
    """An embedding model's; without modules.json vectors are pooled by default and normalized.

    Raises: FatalError: InvalidModelConfig for what this engine does not compute.
    """
    pooling, layers, is_normalized, size = default_pooling, [], False, hidden_size
    modules = _read_modules(folder)
    for kind, name in modules:
        part = ConfigFile.read_optional(folder / name / "config.json")
        match kind:
            case "Transformer":
                pass
            case "Pooling":
                pooling = _read_pooling(part)
            case "Dense":
                layers.append(_read_dense(part, name, size))
                size = layers[-1].out_features
            case "Normalize":
                is_normalized = True
            case _:
                raise FatalError(
                    "InvalidModelConfig",
                    f"{folder / 'modules.json'} has a module {kind!r}; this engine computes "
                    "Transformer, Pooling, Dense and Normalize. Serve another model.",
                )
    settings = ConfigFile.read_optional(folder / "config_sentence_transformers.json")
    prompts = settings.mapping("prompts")
    if not all(isinstance(text, str) for text in prompts.values()):
        raise settings.invalid("prompts", prompts, "an object of names and texts")
    default_prompt = settings.values.get("default_prompt_name")
    if default_prompt is not None and default_prompt not in prompts:
        raise settings.invalid("default_prompt_name", default_prompt, "one of prompts")
    facts = PoolerFacts(
        task="embed",
        size=size,
        is_normalized=is_normalized or not modules,
        dimensions=_read_dimensions(file, size),
        prompts=dict(prompts),
        default_prompt=default_prompt,
    )
    return PoolerConfig(pooling, tuple(layers), facts)


def read_classifier(
    file: ConfigFile, pooling: str, layers: tuple[PoolerLayer, ...]
) -> PoolerConfig:
    """A classifier's or cross-encoder's, whose last layer has an output for each label."""
    size = layers[-1].out_features
    labels = file.mapping("id2label")
    facts = PoolerFacts(
        task="classify",
        size=size,
        labels=[str(labels.get(str(index), f"LABEL_{index}")) for index in range(size)],
        activation=_read_activation(file, size),
    )
    return PoolerConfig(pooling, layers, facts)


def num_labels(file: ConfigFile) -> int:
    """Of a classifier; transformers has two where its file names none."""
    return len(file.mapping("id2label")) or file.integer("num_labels", 2)


def read_max_seq_length(folder: Path) -> int | None:
    """Tokens at which sentence-transformers cuts texts, if its files say so."""
    file = ConfigFile.read_optional(folder / "sentence_bert_config.json")
    if file.boolean("do_lower_case", False):
        raise file.invalid("do_lower_case", True, "false: the tokenizer is to write small letters")
    return file.integer("max_seq_length") if file.values.get("max_seq_length") else None


def is_embedder(folder: Path) -> bool:
    """Whether sentence-transformers' files say what follows the model."""
    return (folder / "modules.json").exists()


def _read_modules(folder: Path) -> list[tuple[str, str]]:
    """Class and folder of each, in order."""
    path = folder / "modules.json"
    text = read_text(path)
    try:
        modules = [] if text is None else json.loads(text)
        return [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FatalError(
            "InvalidModelConfig",
            f"{path} is no list of modules with type and path: {error!r}. Copy the file again.",
        ) from error


def _read_pooling(file: ConfigFile) -> str:
    if not file.boolean("include_prompt", True):
        raise file.invalid("include_prompt", False, "true: prompts are pooled over too")
    asked = [name for key, name in _OLD_POOLINGS.items() if file.boolean(key, False)]
    if named := file.values.get("pooling_mode"):
        asked = [named] if isinstance(named, str) else list(named)
    if len(asked) != 1 or asked[0] not in POOLINGS:
        raise file.invalid("pooling_mode", asked, f"one of {', '.join(POOLINGS)}")
    return POOLINGS[asked[0]]


def _read_dense(file: ConfigFile, name: str, in_features: int) -> PoolerLayer:
    if file.integer("in_features") != in_features:
        raise file.invalid("in_features", file.values["in_features"], str(in_features))
    return PoolerLayer(
        f"{name}/linear",
        in_features,
        file.integer("out_features"),
        file.boolean("bias", True),
        _activation_of_class(file, "activation_function", "Tanh", _OF_LAYERS),
    )


def _read_dimensions(file: ConfigFile, size: int) -> list[int] | None:
    """What a vector may be cut to: [] is anything, None nothing (vLLM's fields of config.json)."""
    named = file.values.get("matryoshka_dimensions")
    if named is None:
        return [] if file.boolean("is_matryoshka", False) else None
    if not isinstance(named, list) or not all(isinstance(n, int) and 0 < n <= size for n in named):
        raise file.invalid("matryoshka_dimensions", named, f"a list of numbers from 1 to {size}")
    return named


def _read_activation(file: ConfigFile, size: int) -> ScoreActivation:
    """What makes scores of logits: as sentence-transformers or transformers would say."""
    own = ConfigFile(file.path, file.mapping("sentence_transformers"))
    for source, key in ((own, "activation_fn"), (file, "sbert_ce_default_activation_function")):
        if source.values.get(key) is not None:
            return _activation_of_class(source, key, "", _OF_LOGITS)
    # A single output is written down as a regression by whoever trained it by two classes.
    if size == 1:
        return "sigmoid"
    match file.values.get("problem_type"):
        case "regression":
            return "identity"
        case "multi_label_classification":
            return "sigmoid"
    return "softmax"


def _activation_of_class(file: ConfigFile, key: str, default: str, names: Mapping[str, A]) -> A:
    value: Any = file.values.get(key, default)
    name = str(value).rpartition(".")[2]
    if name not in names:
        raise file.invalid(key, value, f"a class of torch.nn, one of {', '.join(names)}")
    return names[name]
