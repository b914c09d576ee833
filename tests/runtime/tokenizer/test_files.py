"""Every layout of a tokenizer's files gives the ids, texts and names that transformers gives."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.testing import write_tiny_tokenizer
from pagoda_runtime.tokenizer.files import find_token_id
from pagoda_runtime.tokenizer.tokenizer import load_tokenizer

START, END, TOOL = "<|im_start|>", "<|im_end|>", "<tool>"
CHAT = f"{START}user\nHi{END}\n{START}assistant\n"
NAMES = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ mask_token }}"
SPECIAL = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
# Ids behind the 259 of the tiny vocabulary.
IDS = {START: 259, END: 260, TOOL: 261}

LAYOUTS: dict[str, dict[str, Any]] = {
    "tokenizer.json": {
        "tokenizer.json": [
            {"id": id_, "content": text, "special": True, **SPECIAL} for text, id_ in IDS.items()
        ]
    },
    "added_tokens_decoder": {
        "tokenizer_config.json": {
            "eos_token": END,
            "added_tokens_decoder": {
                str(id_): {"content": text, "special": text != TOOL, **SPECIAL}
                for text, id_ in IDS.items()
            },
        }
    },
    "added_tokens.json": {
        "tokenizer_config.json": {"eos_token": END, "extra_special_tokens": [START]},
        "added_tokens.json": IDS,
    },
    "special_tokens_map.json": {
        "special_tokens_map.json": {
            "eos_token": {"content": END, **SPECIAL},
            "additional_special_tokens": [START, TOOL],
        },
    },
    "special_tokens_map.json beside added_tokens_decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"259": {"content": START, "special": True, **SPECIAL}}
        },
        "special_tokens_map.json": {"eos_token": END},
    },
    "tokens with names of their own": {
        "tokenizer_config.json": {"image_token": START, "extra_special_tokens": {"x_token": END}}
    },
    "ids that the file gives wrong": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"300": {"content": START, "special": True, **SPECIAL}}
        },
    },
    "add_bos_token against the post-processor": {"tokenizer_config.json": {"add_bos_token": False}},
    "special tokens of the user are text": {
        "tokenizer_config.json": {"split_special_tokens": True}
    },
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    write_tiny_tokenizer(folder, NAMES)
    for name, content in files.items():
        path = folder / name
        if name == "tokenizer.json":
            stored = json.loads(path.read_text())
            stored["added_tokens"] += content
        else:
            stored = (json.loads(path.read_text()) if path.exists() else {}) | content
        path.write_text(json.dumps(stored))
    return folder


def verify_equal_to_transformers(folder: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts:
        token_ids = theirs(text)["input_ids"]
        assert ours.encode(text) == token_ids
        shown = [i for i in token_ids if i not in ours.all_special_ids]
        expected = theirs.decode(token_ids, skip_special_tokens=True)
        assert ours.decode(token_ids) == ours.decode(shown, skip_special_tokens=False) == expected
    messages = [{"role": "user", "content": "x"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert ours.eos_token_id == theirs.eos_token_id


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_as_by_transformers(tmp_path, layout):
    folder = write(tmp_path, LAYOUTS[layout])
    verify_equal_to_transformers(folder, [CHAT, f"a{TOOL} {END}b", "</s><pad>"])


@pytest.mark.parametrize("layout", ["tokenizer.json", "added_tokens_decoder", "added_tokens.json"])
def test_a_chat_has_one_token_for_each_of_its_marks(tmp_path, layout):
    tokenizer = load_tokenizer(write(tmp_path, LAYOUTS[layout]))
    assert len(tokenizer.encode(CHAT, add_special_tokens=False)) == 21


def make_random_files(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    texts = [START, END, TOOL, "</s>", "<s>", "<pad>", "ab"]
    known = {"<pad>": 0, "<s>": 1, "</s>": 2}
    ids = known | {text: 259 + i for i, text in enumerate(t for t in texts if t not in known)}

    def some() -> list[str]:
        return rng.sample(texts, rng.randint(0, 4))

    def token(text: str) -> dict[str, Any]:
        return {"content": text, **{flag: rng.random() < 0.3 for flag in (*SPECIAL, "special")}}

    config: dict[str, Any] = {"eos_token": rng.choice(texts), "image_token": rng.choice(texts)}
    if rng.random() < 0.5:
        config["added_tokens_decoder"] = {str(ids[text]): token(text) for text in some()}
    if rng.random() < 0.5:
        config[rng.choice(["extra_special_tokens", "additional_special_tokens"])] = some()
    files = {"tokenizer_config.json": config}
    if rng.random() < 0.5:
        files["added_tokens.json"] = {text: ids[text] for text in some()}
    if rng.random() < 0.5:
        files["special_tokens_map.json"] = {
            "mask_token": {key: value for key, value in token("ab").items() if key != "special"},
            "additional_special_tokens": some(),
        }
    return files


@pytest.mark.parametrize("seed", range(20))
def test_files_that_contradict_each_other_are_read_as_by_transformers(tmp_path, seed):
    folder = write(tmp_path, make_random_files(seed))
    verify_equal_to_transformers(folder, [CHAT, f"ab{TOOL} ab {END}</s><pad><s>"])


def test_an_id_that_the_file_gives_wrong_is_named_at_the_start(tmp_path, caplog):
    folder = write(tmp_path, LAYOUTS["ids that the file gives wrong"])
    with caplog.at_level(logging.WARNING):
        load_tokenizer(folder)
    assert "'<|im_start|>' is said to have the id 300, and has 259" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "<x>"}}, "an object of ids"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {}}}, "an object of ids"),
        ("added_tokens.json", {"<x>": "seven"}, "the id of this token"),
    ],
)
def test_added_tokens_of_another_form_are_refused(tmp_path, name, content, words):
    with pytest.raises(FatalError, match=words) as caught:
        load_tokenizer(write(tmp_path, {name: content}))
    assert str(tmp_path / name) in caught.value.message


def test_an_id_is_found_without_the_tokenizer(tmp_path):
    folder = write(tmp_path, LAYOUTS["tokenizer.json"])
    assert [find_token_id(folder, text) for text in (END, "a", "no such token")] == [260, 67, None]
    assert find_token_id(tmp_path / "absent", "a") is None
