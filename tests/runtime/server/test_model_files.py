"""A server of a tiny checkpoint whose files disagree about end tokens and set defaults."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer

from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.server.testing_process import ServerProcess
from pagoda_runtime.tokenizer.tokenizer import load_tokenizer

FLAGS = ["--host", "127.0.0.1", "--port", "0", "--kv-cache-memory-bytes", "4000000"]
FLAGS += ["--num-threads", "1", "--drain-delay-seconds", "0", "--dtype", "float32"]
DEFAULTS = {"repetition_penalty": 1.4, "max_new_tokens": 7}
PROMPTS = ("abc", "xyz", "hello")


class World(NamedTuple):
    """The model's folder and, by the file that names their end token, prompts with answers.

    `token_ids` are what transformers answers with, the end token included.
    """

    folder: Path
    prompts: dict[str, str]
    token_ids: dict[str, list[int]]


def transformers_answer(model: Any, prompt_ids: list[int], eos: list[int] | None) -> list[int]:
    ids = torch.tensor([prompt_ids])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=eos, **DEFAULTS
    )
    return output[0, len(prompt_ids) :].tolist()


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    encoded = {prompt: tokenizer.encode(prompt) for prompt in PROMPTS}
    whole = {prompt: transformers_answer(model, ids, None) for prompt, ids in encoded.items()}
    # An ordinary token in the midst of each of the first two answers becomes an end token.
    ends = [next(i for i in whole[prompt][2:] if 3 <= i < 259) for prompt in PROMPTS[:2]]
    edit(folder / "config.json", eos_token_id=ends[0])
    (folder / "generation_config.json").write_text(json.dumps(DEFAULTS))
    end_text = FastTokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(ends[1])
    edit(folder / "tokenizer_config.json", eos_token=end_text)
    answers = [transformers_answer(model, encoded[prompt], ends) for prompt in PROMPTS]
    names = ("config", "tokenizer", "neither")
    return World(
        folder, dict(zip(names, PROMPTS, strict=True)), dict(zip(names, answers, strict=True))
    )


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[ServerProcess]:
    command = ["pagoda_runtime", "serve", str(world.folder), *FLAGS]
    server = ServerProcess(command, world.folder.parent / "termination-log")
    yield server
    server.close()


@pytest.fixture(scope="module")
def complete(server: ServerProcess) -> Callable[..., tuple[str, list[int], str]]:
    """Answers a prompt with text, token ids and finish reason."""
    url = server.wait_until_ready()

    def complete(prompt: str, **fields: Any) -> tuple[str, list[int], str]:
        asked = {"prompt": prompt, "temperature": 0, "logprobs": 0, **fields}
        asked["return_tokens_as_token_ids"] = True
        answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
        (choice,) = answer.raise_for_status().json()["choices"]
        token_ids = [int(token.split(":")[1]) for token in choice["logprobs"]["tokens"]]
        return choice["text"], token_ids, choice["finish_reason"]

    return complete


@pytest.mark.parametrize("name", ["config", "tokenizer"])
def test_an_answer_ends_at_each_file_s_end_token_without_its_text(complete, world, name):
    token_ids = world.token_ids[name]
    text = load_tokenizer(world.folder).decode(token_ids[:-1])
    assert len(token_ids) == 3
    assert complete(world.prompts[name]) == (text, token_ids, "stop")


def test_an_end_token_that_is_ignored_is_text_as_any_other(complete, world):
    prompt = world.prompts["config"]
    text, token_ids, reason = complete(prompt, ignore_eos=True)
    assert (len(token_ids), reason) == (7, "length")
    tokenizer = load_tokenizer(world.folder)
    assert text == tokenizer.decode(token_ids)
    assert tokenizer.token_text(token_ids[2]) in text


def test_the_end_tokens_are_told_at_the_start(complete, server, world):
    first, second = (world.token_ids[name][-1] for name in ("config", "tokenizer"))
    line = f"Answers end at token {first} (config.json), {second} (tokenizer_config.json)"
    assert line in "".join(server.lines)


def test_the_file_s_penalty_and_limit_hold_where_a_request_is_silent(complete, world):
    prompt, token_ids = world.prompts["neither"], world.token_ids["neither"]
    assert complete(prompt)[1:] == (token_ids, "length")
    assert complete(prompt, max_tokens=3)[1] == token_ids[:3]
    assert len(complete(prompt, max_tokens=9, ignore_eos=True)[1]) == 9


def test_a_request_s_own_penalty_comes_first(complete, world):
    own = {"repetition_penalty": 1.0, "ignore_eos": True}
    answers = [complete(prompt, **own)[1] for prompt in PROMPTS]
    assert answers != [complete(prompt, ignore_eos=True)[1] for prompt in PROMPTS]
