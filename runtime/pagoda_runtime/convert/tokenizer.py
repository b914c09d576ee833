"""Rebuilding tokenizer.json and generation_config.json from the vocabulary in a GGUF file.

Two kinds exist: `llama` (SentencePiece BPE: scores, byte fallback, spaces as ▁) and `gpt2`
(byte-level BPE with its merges, and a pre-tokenizer that the file only names).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pagoda_runtime.convert.reader import GgufFile
from pagoda_runtime.errors import FatalError

# Values of tokenizer.ggml.token_type.
CONTROL, USER_DEFINED = 3, 4

_LETTERS_AND_SPACE = (
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # what both patterns below end with
)
PRE_TOKENIZER_PATTERNS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    + _LETTERS_AND_SPACE,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _LETTERS_AND_SPACE,
}
# What llama.cpp reads as another name of the same pre-tokenizer.
ALIASES = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"),
    "gpt-2": ("phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4"),
}
CANONICAL_NAMES = {name: name for name in PRE_TOKENIZER_PATTERNS} | {
    alias: name for name, aliases in ALIASES.items() for alias in aliases
}
# Many files name one end token only, that of texts; a turn ends with a token that has its text.
END_TEXTS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<EOT>", "_<EOT>"}
    | {"<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"}
    | {"<|return|>", "<|call|>"}
)


def build_generation_config(file: GgufFile) -> dict[str, Any]:
    """The generation_config.json: which tokens begin and end a text."""
    named = {file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    return {
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted((named - {None}) | end_tokens_by_text(_tokens(file))),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
    }


def end_tokens_by_text(tokens: Sequence[str]) -> set[int]:
    """Ids of the tokens that end an answer by what they are called."""
    found = {token: index for index, token in enumerate(tokens) if token in END_TEXTS}
    if found.keys() >= {"<|return|>", "<|call|>"}:
        # In this vocabulary <|end|> ends a message, behind which the same answer goes on.
        found.pop("<|end|>", None)
    return set(found.values())


def _tokens(file: GgufFile) -> list[str]:
    tokens: list[str] = file.get("tokenizer.ggml.tokens", required=True)
    return tokens


def build_tokenizer_files(file: GgufFile, *, chat_template: str | None) -> dict[str, str]:
    """File name → content: tokenizer.json, tokenizer_config.json and, if any, the template."""
    tokens = _tokens(file)
    types = list(file.get("tokenizer.ggml.token_type") or [1] * len(tokens))
    for index in end_tokens_by_text(tokens):
        # Some files call them ordinary; they would come out as text, and be split in prompts.
        types[index] = CONTROL
    kind = file.get("tokenizer.ggml.model", required=True)
    if kind == "llama":
        body = _sentencepiece_bpe(file, tokens, types)
    elif kind == "gpt2":
        body = _byte_level_bpe(file, tokens)
    else:
        raise FatalError(
            "InvalidModelConfig",
            f"{file.path}: tokenizer {kind} is not supported; supported are llama and gpt2.",
        )
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        "post_processor": _post_processor(file, tokens),
        **body,
    }
    files = {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_tokenizer_config(file, tokens), indent=2),
    }
    template = chat_template or file.get("tokenizer.chat_template")
    if template:
        files["chat_template.jinja"] = template
    return files


def _sentencepiece_bpe(file: GgufFile, tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = file.get("tokenizer.ggml.scores", required=True)
    add_prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    replace_space: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = (
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace_space]}
        if add_prefix
        else replace_space
    )
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if add_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = file.get("tokenizer.ggml.unknown_token_id")
    return {
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges_by_score(tokens, scores, types),
        },
    }


def merges_by_score(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """The merge list with which BPE repeats SentencePiece's choice: the best score first.

    Every split of a token into two tokens is a merge that yields it. Control and user-defined
    tokens are matched before BPE, so no merge leads to one.
    """
    vocabulary = {
        token: index
        for index, token in enumerate(tokens)
        if types[index] not in (CONTROL, USER_DEFINED)
    }
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                rank = (-scores[index], index, vocabulary[left], vocabulary[right], left, right)
                ranked.append(rank)
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _byte_level_bpe(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    name = file.get("tokenizer.ggml.pre", "gpt-2")
    if name not in CANONICAL_NAMES:
        raise FatalError(
            "InvalidModelConfig",
            f"{file.path}: pre-tokenizer {name} is not supported; supported are "
            f"{', '.join(sorted(CANONICAL_NAMES))}.",
        )
    split = {
        "type": "Split",
        "pattern": {"Regex": PRE_TOKENIZER_PATTERNS[CANONICAL_NAMES[name]]},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    merges = [line.split(" ", 1) for line in file.get("tokenizer.ggml.merges", required=True)]
    return {
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": {**byte_level, "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": CANONICAL_NAMES[name] == "llama-bpe",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[index] == CONTROL,
        }
        for index, token in enumerate(tokens)
        if types[index] in (CONTROL, USER_DEFINED)
    ]


def _adds_bos(file: GgufFile) -> bool:
    """What the file says, or else what llama.cpp takes for granted of its kind of vocabulary."""
    is_llama3 = CANONICAL_NAMES.get(file.get("tokenizer.ggml.pre")) == "llama-bpe"
    is_expected = file.get("tokenizer.ggml.model") == "llama" or is_llama3
    has_bos = file.get("tokenizer.ggml.bos_token_id") is not None
    return has_bos and bool(file.get("tokenizer.ggml.add_bos_token", is_expected))


def _post_processor(file: GgufFile, tokens: list[str]) -> dict[str, Any] | None:
    if not _adds_bos(file):
        return None
    bos_id = file.get("tokenizer.ggml.bos_token_id", required=True)
    bos = {"SpecialToken": {"id": tokens[bos_id], "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {
            tokens[bos_id]: {"id": tokens[bos_id], "ids": [bos_id], "tokens": [tokens[bos_id]]}
        },
    }


def _tokenizer_config(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(file),
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.get("{arch}.context_length"),
    }
    for role, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = file.get(f"tokenizer.ggml.{field}_token_id")
        if token_id is not None:
            config[f"{role}_token"] = tokens[token_id]
    return config
