"""Byte-level vocabularies in GGUF files: what llama.cpp knows of them without being told."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from pagoda_runtime.convert.reader import open_gguf
from pagoda_runtime.convert.tokenizer import build_generation_config, build_tokenizer_files
from pagoda_runtime.errors import FatalError

VOCABULARY = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
BOS, EOS = len(VOCABULARY), len(VOCABULARY) + 1
NORMAL, CONTROL = 1, 3


def write_gguf(path: Path, pre: str, *, end_tokens: tuple[str, ...] = (), **keys: object) -> Path:
    """A file without tensors; end_tokens are ordinary ones behind BOS and EOS."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*VOCABULARY, "<bos>", "<eos>", *end_tokens])
    writer.add_token_types([NORMAL] * len(VOCABULARY) + [CONTROL] * 2 + [NORMAL] * len(end_tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    if "add_bos_token" in keys:
        writer.add_add_bos_token(bool(keys["add_bos_token"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_str(
        build_tokenizer_files(open_gguf(path), chat_template=None)["tokenizer.json"]
    )


@pytest.mark.parametrize(
    ("pre", "keys", "begins"),
    [
        ("llama-bpe", {}, True),
        ("llama3", {}, True),
        ("llama-v3", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
        ("qwen2", {}, False),
        ("deepseek-r1-qwen", {}, False),
        ("deepseek-r1-qwen", {"add_bos_token": True}, True),
    ],
)
def test_llama_3_begins_with_bos_unless_the_file_says_no(tmp_path, pre, keys, begins):
    path = write_gguf(tmp_path / "a.gguf", pre, **keys)
    assert (tokenizer_of(path).encode("x").ids[0] == BOS) is begins
    settings = build_tokenizer_files(open_gguf(path), chat_template=None)["tokenizer_config.json"]
    assert json.loads(settings)["add_bos_token"] is begins


@pytest.mark.parametrize(
    ("alias", "name"),
    [("llama3", "llama-bpe"), ("llama-v3", "llama-bpe"), ("deepseek-r1-qwen", "qwen2")],
)
def test_other_names_of_a_pre_tokenizer_split_alike(tmp_path, alias, name):
    splits = []
    for pre in (alias, name):
        tokenizer = tokenizer_of(write_gguf(tmp_path / f"{pre}.gguf", pre))
        splits.append(tokenizer.pre_tokenizer.pre_tokenize_str("I'LL take 12345 of\n\n them!!"))
    assert splits[0] == splits[1]


def test_an_unknown_pre_tokenizer_is_refused_with_all_names(tmp_path):
    with pytest.raises(FatalError, match=r"pre-tokenizer foo is not supported.*deepseek-r1-qwen"):
        tokenizer_of(write_gguf(tmp_path / "a.gguf", "foo"))


@pytest.mark.parametrize("text", ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"])
def test_the_end_of_a_turn_is_found_by_its_text(tmp_path, text):
    path = write_gguf(tmp_path / "a.gguf", "llama-bpe", end_tokens=(text,))
    assert build_generation_config(open_gguf(path))["eos_token_id"] == [EOS, EOS + 1]
    tokenizer = tokenizer_of(path)
    assert tokenizer.encode(f"x{text}", add_special_tokens=False).ids[-1] == EOS + 1
    assert tokenizer.decode([EOS + 1]) == ""


def test_a_message_ends_no_answer_where_returns_and_calls_do(tmp_path):
    texts = ("<|end|>", "<|return|>", "<|call|>")
    path = write_gguf(tmp_path / "a.gguf", "llama-bpe", end_tokens=texts)
    assert build_generation_config(open_gguf(path))["eos_token_id"] == [EOS, EOS + 2, EOS + 3]
