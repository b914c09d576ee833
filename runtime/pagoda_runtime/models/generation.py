"""What a model's files say about its answers: at which tokens they end, how they are drawn."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagoda_runtime.config_file import ConfigFile, is_number
from pagoda_runtime.errors import FatalError, RequestError
from pagoda_runtime.models.config import ModelConfig, Note
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.tokenizer.files import SETTINGS_NAME, TokenizerFiles, find_token_id

# Key of generation_config.json → field of SamplingParams.
_ALWAYS = {"repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}
# transformers draws only if do_sample says so; otherwise these are leftovers.
_IF_DRAWN = {name: name for name in ("temperature", "top_p", "top_k", "min_p")}
# What transformers heeds beside them, with the values that ask for nothing.
_NOT_HEEDED: Mapping[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "stop_strings": ([],),
}


def read_generation(
    config: ModelConfig, file: ConfigFile, *, uses_defaults: bool = True
) -> ModelConfig:
    """The config with the end tokens and the sampling defaults of the model's folder.

    Args:
        file: config.json, beside which the others lie.
        uses_defaults: whether sampling defaults are taken from generation_config.json.
    Raises: FatalError: InvalidModelConfig or ModelAccessDenied.
    """
    generation = ConfigFile.read_optional(file.path.with_name("generation_config.json"))
    ends = _find_end_tokens(file, generation)
    known = {token_id: name for token_id, name in ends.items() if token_id < config.vocab_size}
    defaults = _sampling_defaults(generation) if uses_defaults else {}
    notes = _notes_on_ends(file.path.parent, ends, known, config.vocab_size)
    if uses_defaults:
        notes += _notes_on_defaults(generation)
    return replace(config, eos_token_ids=tuple(known), default_sampling=defaults, notes=notes)


def _find_end_tokens(file: ConfigFile, generation: ConfigFile) -> dict[int, str]:
    """Id → the file that names it. Files that disagree are all right: a chat tuned on another end
    of turn than config.json tells has it in its tokenizer alone."""
    source = generation if generation.values.get("eos_token_id") is not None else file
    eos = source.values.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise source.invalid("eos_token_id", eos, "a token id or a list of them")
    ends = dict.fromkeys(ids, source.path.name)
    of_tokenizer = _tokenizer_end_token(file.path.parent)
    if of_tokenizer is not None:
        ends.setdefault(of_tokenizer, SETTINGS_NAME)
    return ends


def _notes_on_ends(
    folder: Path, ends: Mapping[int, str], known: Mapping[int, str], vocab_size: int
) -> tuple[Note, ...]:
    notes = [
        (
            logging.WARNING,
            f"End token {token_id} ({ends[token_id]}) is not in the model's vocabulary of "
            f"{vocab_size} tokens",
        )
        for token_id in ends
        if token_id not in known
    ]
    if known:
        shown = ", ".join(f"{token_id} ({name})" for token_id, name in known.items())
        return (*notes, (logging.INFO, f"Answers end at token {shown}"))
    lack = (
        f"{folder} has no end token (eos_token_id in config.json or generation_config.json, "
        f"eos_token in {SETTINGS_NAME}), so answers end only at stop strings and at max_tokens."
    )
    return (*notes, (logging.WARNING, lack))


def _notes_on_defaults(generation: ConfigFile) -> tuple[Note, ...]:
    values = generation.values
    ignored = [
        key
        for key, neutral in _NOT_HEEDED.items()
        if values.get(key) is not None and values[key] not in neutral
    ]
    message = f"{generation.path}: not heeded here: {', '.join(ignored)}"
    return ((logging.WARNING, message),) if ignored else ()


def _tokenizer_end_token(folder: Path) -> int | None:
    files = TokenizerFiles.read(folder)
    text = files.special_tokens.get("eos_token")
    if text is None:
        return None
    declared = (i for i, token in files.added_tokens.items() if token["content"] == text)
    found = find_token_id(folder, text)
    return next(declared, None) if found is None else found


def _sampling_defaults(generation: ConfigFile) -> dict[str, float | int]:
    values = generation.values
    names = _ALWAYS | (_IF_DRAWN if values.get("do_sample") else {})
    defaults: dict[str, float | int] = {}
    for key, name in names.items():
        value = values.get(key)
        if value is None:
            continue
        if not is_number(value):
            raise generation.invalid(key, value, "a number")
        defaults[name] = value
    try:
        SamplingParams(**{"max_tokens": None, **defaults}).verify()  # type: ignore[arg-type]
    except RequestError as error:
        raise FatalError(
            "InvalidModelConfig",
            f"{generation.path}: {error.message} Correct the file, or leave its defaults out "
            "with --generation-config none.",
        ) from error
    return defaults
