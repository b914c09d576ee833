"""The files of a tokenizer beside tokenizer.json: special tokens, added tokens and chat template.

Checkpoints came in four layouts over the years: all in tokenizer.json; added_tokens_decoder in
tokenizer_config.json; added_tokens.json and special_tokens_map.json as well. What counts where they
disagree is what transformers 5 reads from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagoda_runtime.config_file import ConfigFile, read_text

Token = dict[str, Any]
"""Content and flags: the arguments of `tokenizers.AddedToken`."""

SETTINGS_NAME = "tokenizer_config.json"
DEFAULT_TEMPLATE = "default"
_NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_INPUTS = ("input_ids", "token_type_ids", "attention_mask")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files of one folder say; nothing of it is looked up in the vocabulary yet."""

    special_tokens: Mapping[str, str]
    """bos_token, eos_token, … → their text; templates know them by these names."""
    added_tokens: Mapping[int, Token]
    """By the ids that the files give them."""
    has_all_added: bool
    """Whether added_tokens are all that there are; else those of tokenizer.json belong to them."""
    special_list: tuple[Token, ...]
    """Special tokens that have to be in the vocabulary, with whatever id."""
    splits_special_tokens: bool
    """Whether a special token that is written in a text is text."""
    chat_templates: Mapping[str, str]
    """By name."""
    has_types: bool = True
    """Whether models are to be told which text of a pair a token is of."""

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Raises: FatalError: ModelAccessDenied, InvalidModelConfig."""
        file = ConfigFile.read_optional(folder / SETTINGS_NAME)
        settings = dict(file.values)
        if not settings.get("extra_special_tokens"):
            settings["extra_special_tokens"] = settings.pop("additional_special_tokens", None)
        has_all_added = "added_tokens_decoder" in settings
        if not has_all_added:
            settings |= ConfigFile.read_optional(folder / "special_tokens_map.json").values
        named = _named_tokens(settings)
        extra, additional = map(settings.get, ("extra_special_tokens", "additional_special_tokens"))
        listed = _listed_tokens(extra)
        return cls(
            special_tokens={name: token["content"] for name, token in named.items()},
            added_tokens=_declared_tokens(file)
            if has_all_added
            else _old_added_tokens(folder, [*map(named.get, _NAMED), *listed]),
            has_all_added=has_all_added,
            special_list=(*named.values(), *(listed or _listed_tokens(additional))),
            splits_special_tokens=bool(settings.get("split_special_tokens")),
            chat_templates=_chat_templates(folder, settings),
            has_types="token_type_ids" in (settings.get("model_input_names") or _INPUTS),
        )


def _declared_tokens(file: ConfigFile) -> dict[int, Token]:
    key = "added_tokens_decoder"
    tokens = {}
    for token_id, value in file.mapping(key).items():
        token = _as_token(value)
        if token is None or not token_id.isdecimal():
            raise file.invalid(key, {token_id: value}, "an object of ids and tokens with content")
        tokens[int(token_id)] = token
    return tokens


def _old_added_tokens(folder: Path, specials: Iterable[Token | None]) -> dict[int, Token]:
    """Those of added_tokens.json, which tells only texts and ids."""
    special_texts = {token["content"] for token in specials if token is not None}
    file = ConfigFile.read_optional(folder / "added_tokens.json")
    tokens = {}
    for text, token_id in file.values.items():
        if not isinstance(token_id, int):
            raise file.invalid(text, token_id, "the id of this token")
        is_special = text in special_texts
        tokens[token_id] = {"content": text, "special": is_special, "normalized": not is_special}
    return tokens


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, Token]:
    """The tokens that have a name, transformers' own names first."""
    others = [key for key in settings if key.endswith("_token") and key not in _NAMED]
    found = {name: _as_token(settings.get(name)) for name in (*_NAMED, *others)}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, Mapping):
        found |= {name: _as_token(value) for name, value in extra.items()}
    return {name: token | {"special": True} for name, token in found.items() if token is not None}


def _listed_tokens(listed: object) -> list[Token]:
    """The special tokens without a name."""
    found = map(_as_token, listed if isinstance(listed, list) else ())
    return [{"special": True} | token for token in found if token is not None]


def _as_token(value: object) -> Token | None:
    """The content and the flags of a token, which files write as a text or an object."""
    if isinstance(value, str):
        return {"content": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        return None
    return {"content": value["content"]} | {key: value[key] for key in _FLAGS if key in value}


def find_token_id(folder: Path, text: str) -> int | None:
    """The id of a token, without the time and memory that building the tokenizer takes."""
    source = read_text(folder / "tokenizer.json")
    if source is None:
        return None
    try:
        # The added tokens stand before the vocabulary, which takes a second to parse.
        if (start := source.find('"added_tokens"')) >= 0:
            added, _ = json.JSONDecoder().raw_decode(source, source.index("[", start))
            for token in added:
                if token["content"] == text:
                    return int(token["id"])
        vocabulary = json.loads(source)["model"]["vocab"]
    except (ValueError, KeyError, TypeError):
        return None
    if isinstance(vocabulary, list):
        vocabulary = {entry[0]: token_id for token_id, entry in enumerate(vocabulary)}
    token_id: int | None = vocabulary.get(text)
    return token_id


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """By name: chat_template.jinja or the one in tokenizer_config.json is the default, others have
    a name there, or are files of a folder of their own."""
    stored = settings.get("chat_template")
    if isinstance(stored, list):
        named = {
            t["name"]: t.get("template") for t in stored if isinstance(t, dict) and "name" in t
        }
    else:
        named = {DEFAULT_TEMPLATE: stored}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[path.stem] = read_text(path)
    named[DEFAULT_TEMPLATE] = read_text(folder / "chat_template.jinja") or named.get(
        DEFAULT_TEMPLATE
    )
    return {str(name): text for name, text in named.items() if isinstance(text, str)}
