"""Which tokenizers fill in the middle, and how."""

from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer as FastTokenizer

from pagoda_runtime.models.testing import write_tiny_tokenizer
from pagoda_runtime.tokenizer.infill import FORMATS, find_infill_format
from pagoda_runtime.tokenizer.tokenizer import load_tokenizer


def markers_of(text: str) -> list[str]:
    return [part for part in re.split(r"\{\w+\}", text) if part]


@pytest.mark.parametrize("text", FORMATS)
def test_each_format_is_found_by_its_own_markers_alone(text):
    *some, last = markers_of(text)
    vocabulary = dict.fromkeys([*some, last], 7)
    assert find_infill_format(vocabulary.get) == text
    del vocabulary[last]
    assert find_infill_format(vocabulary.get) is None


def test_the_markers_of_a_prompt_become_their_own_tokens(tmp_path):
    write_tiny_tokenizer(tmp_path)
    path = str(tmp_path / "tokenizer.json")
    tokenizer = FastTokenizer.from_file(path)
    tokenizer.add_special_tokens(markers_of(FORMATS[0]))
    tokenizer.save(path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.infill_format == FORMATS[0]
    ids = loaded.encode(loaded.infill_format.format(prefix="a", suffix="b"))
    names = ["<s>", "<|fim_prefix|>", "a", "<|fim_suffix|>", "b", "<|fim_middle|>"]
    assert loaded.convert_ids_to_tokens(ids) == names


def test_a_tokenizer_without_markers_has_no_format(tmp_path):
    write_tiny_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).infill_format is None
