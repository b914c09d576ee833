"""Where answers end and how they are drawn, by what the files of a model say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pagoda_runtime.config_file import ConfigFile
from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.generation import read_generation
from pagoda_runtime.models.llama import llama
from pagoda_runtime.models.testing import write_tiny_tokenizer

CONFIG = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def read(
    folder: Path,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    **flags: bool,
) -> ModelConfig:
    """What read_generation makes of these files; without tokenizer there is none."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer is not None:
        write_tiny_tokenizer(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    file = ConfigFile.read(folder / "config.json")
    return read_generation(llama(file), file, **flags)


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (7, None, None, (7,)),
        (7, [3, 4], None, (3, 4)),
        (7, None, {"eos_token": "</s>"}, (7, 2)),
        (2, None, {"eos_token": "</s>"}, (2,)),
        (None, None, {"eos_token": {"content": "</s>"}}, (2,)),
        # An ordinary token of the vocabulary, and one that only the settings know.
        (7, None, {"eos_token": "a"}, (7, 67)),
        (
            7,
            None,
            {"eos_token": "<end>", "added_tokens_decoder": {"259": {"content": "<end>"}}},
            (7, 259),
        ),
        (7, None, {"eos_token": "no such token"}, (7,)),
    ],
)
def test_answers_end_at_the_tokens_of_all_files(tmp_path, config, generation, tokenizer, expected):
    generation = None if generation is None else {"eos_token_id": generation}
    found = read(tmp_path, {"eos_token_id": config}, generation, tokenizer)
    assert found.eos_token_ids == expected


def test_the_start_tells_which_file_names_which_end_token(tmp_path):
    config = read(tmp_path, {"eos_token_id": 7}, None, {"eos_token": "</s>"})
    note = "Answers end at token 7 (config.json), 2 (tokenizer_config.json)"
    assert config.notes == ((logging.INFO, note),)


def test_a_model_without_an_end_token_is_warned_of(tmp_path):
    config = read(tmp_path, tokenizer={})
    ((level, message),) = config.notes
    assert (config.eos_token_ids, level) == ((), logging.WARNING)
    assert "has no end token" in message


def test_an_end_token_that_the_model_does_not_have_is_left_out(tmp_path):
    config = read(tmp_path, {"eos_token_id": [7, 300]})
    note = "End token 300 (config.json) is not in the model's vocabulary of 300 tokens"
    assert config.eos_token_ids == (7,)
    assert config.notes[0] == (logging.WARNING, note)


def test_a_file_that_does_not_draw_still_penalises_and_limits(tmp_path):
    values = {
        "temperature": 0.6,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_new_tokens": 99,
        "top_p": None,
    }
    always = {"repetition_penalty": 1.1, "max_tokens": 99}
    assert read(tmp_path, generation=values).default_sampling == always
    drawn = {"temperature": 0.6, "top_k": 20, "min_p": 0.05, **always}
    assert read(tmp_path, generation={**values, "do_sample": True}).default_sampling == drawn
    assert read(tmp_path, uses_defaults=False).default_sampling == {}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": "much"}, "it must be a number"),
        ({"do_sample": True, "min_p": 1.5}, "min_p is 1.5; it must be from 0 to 1"),
        ({"do_sample": True, "top_k": 2.5}, "top_k is 2.5"),
    ],
)
def test_a_default_that_no_request_could_have_is_refused_at_the_start(tmp_path, value, words):
    with pytest.raises(FatalError, match=words) as caught:
        read(tmp_path, generation=value)
    assert caught.value.reason == "InvalidModelConfig"
    assert str(tmp_path / "generation_config.json") in caught.value.message


def test_what_is_not_heeded_is_said(tmp_path):
    generation = {"no_repeat_ngram_size": 3, "num_beams": 1, "typical_p": 0.9, "top_h": None}
    level, note = read(tmp_path, {"eos_token_id": 7}, generation).notes[-1]
    assert level == logging.WARNING
    assert note.endswith("not heeded here: no_repeat_ngram_size, typical_p")
    assert len(read(tmp_path, {"eos_token_id": 7}, generation, uses_defaults=False).notes) == 1
