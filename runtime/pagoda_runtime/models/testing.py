"""Tiny random checkpoints for tests, written by transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}
"""Family → settings beside the common ones."""

_COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def make_tiny_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    max_shard_size: str = "50GB",
    **settings: Any,
) -> Path:
    """Write a random model of a family, with a byte-level tokenizer, and return its folder.

    Args:
        settings: override fields of config.json, as rope_parameters or num_hidden_layers.
        max_shard_size: lower it to get several files and an index.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_COMMON, **TINY.get(family, {}), **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomize(model)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tiny_tokenizer(folder)
    return folder


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        # Large enough that tokens differ and no near-tie decides; norms away from the identity.
        if "norm" in name.lower():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.copy_(torch.randn_like(parameter) * 0.15)


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "modernbert": {
        "num_hidden_layers": 4,
        "local_attention": 8,
        "classifier_pooling": "mean",
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
}
"""Family → settings beside the common ones."""


def make_tiny_pooled_checkpoint(
    folder: Path, family: str, *, num_labels: int = 0, modules: bool = False, **settings: Any
) -> Path:
    """Write a random model whose texts are pooled, with a byte-level tokenizer.

    Args:
        num_labels: above 0 of a classifier.
        modules: whether sentence-transformers' files are there: mean pooling, a dense layer to half
            the size, normalization, and prompts.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    own = ENCODERS.get(family, TINY.get(family, {}))
    labels = {"num_labels": num_labels} if num_labels else {}
    config = AutoConfig.for_model(family, **{**_COMMON, **own, **labels, **settings})
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if num_labels else AutoModel
    model = kind.from_config(config, dtype=torch.float32)
    _randomize(model)
    model.save_pretrained(folder)
    has_segments = own.get("type_vocab_size", 2) > 1
    write_tiny_tokenizer(folder, for_pairs="1" if has_segments else "0")
    if modules:
        _write_modules(folder, config.hidden_size)
    return folder


def _write_modules(folder: Path, size: int) -> None:
    """The files of sentence-transformers."""
    from safetensors.torch import save_file

    names = {
        "": "Transformer",
        "1_Pooling": "Pooling",
        "2_Dense": "Dense",
        "3_Normalize": "Normalize",
    }
    parts = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(names.items())
    ]
    dense = {
        "in_features": size,
        "out_features": size // 2,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    prompts = {"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": None}
    pooling = {"word_embedding_dimension": size, "pooling_mode_mean_tokens": True}
    for path, content in {
        "modules.json": parts,
        "1_Pooling/config.json": pooling,
        "2_Dense/config.json": dense,
        "config_sentence_transformers.json": prompts,
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
    }.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    (folder / "3_Normalize").mkdir(exist_ok=True)
    weights = {
        "linear.weight": torch.randn(size // 2, size) * 0.1,
        "linear.bias": torch.randn(size // 2) * 0.1,
    }
    save_file(weights, folder / "2_Dense" / "model.safetensors")


def write_tiny_tokenizer(
    folder: Path, chat_template: str | None = None, *, for_pairs: str = ""
) -> None:
    """tokenizer.json and tokenizer_config.json: one token per byte, ids 3 to 258.

    for_pairs: the type of a second text's tokens, 0 or 1; then texts end with </s>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if for_pairs else "<s> $A",
        pair=f"<s> $A </s> $B:{for_pairs} </s>:{for_pairs}" if for_pairs else None,
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    if for_pairs == "1":
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
