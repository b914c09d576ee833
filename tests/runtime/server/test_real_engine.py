"""`pagoda serve` on a tiny random checkpoint: the whole way from HTTP to the model and back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from pagoda_runtime.convert.testing import write_gguf
from pagoda_runtime.models.testing import make_tiny_checkpoint, write_tiny_tokenizer
from pagoda_runtime.server.testing_process import ServerProcess

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
FLAGS = ["--host", "127.0.0.1", "--port", "0", "--kv-cache-memory-bytes", "4000000"]
FLAGS += ["--num-threads", "1", "--drain-delay-seconds", "0.2", "--max-num-batched-tokens", "64"]
FLAGS += ["--max-num-seqs", "8"]
# The only token that may be drawn: the letter a.
ONLY_A = {"allowed_token_ids": [67]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    write_tiny_tokenizer(folder, TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    command = ["pagoda_runtime", "serve", str(folder), "--served-model-name", "tiny"]
    server = ServerProcess([*command, *FLAGS], folder.parent / "termination-log")
    yield server
    server.close()


@pytest.fixture(scope="module")
def url(server: ServerProcess) -> str:
    return server.wait_until_ready()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.mark.slow
def test_a_gguf_file_is_served_as_it_is_given(tmp_path, monkeypatch):
    cache = Path(os.environ.get("PAGODA_CACHE") or "~/.cache/pagoda").expanduser()
    (tmp_path / "kernels").symlink_to(cache / "kernels")
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path))
    source = write_gguf(tmp_path / "tiny.gguf", "llama")
    command = ["pagoda_runtime", "serve", str(source), "--served-model-name", "tiny"]
    with contextlib.closing(ServerProcess([*command, *FLAGS], tmp_path / "log")) as server:
        url = server.wait_until_ready()
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "ab", "max_tokens": 4})
        assert answer.json()["usage"]["completion_tokens"] == 4
    assert sum("Converting" in line for line in server.lines) == 1


def scrape(url: str) -> dict[str, float]:
    """The values of the metrics that have the model's name as their only label."""
    label = '{model_name="tiny"}'
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {
        name.removesuffix(label): float(value)
        for name, _, value in (line.rpartition(" ") for line in lines)
        if name.endswith(label)
    }


def test_a_streamed_text_is_the_text_of_one_piece(client):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.usage.prompt_tokens == 4, "the tokenizer adds <s>"


def test_a_seed_gives_the_same_text_again(client):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "seed": 5}
    first, second = (client.completions.create(**asked).choices[0].text for _ in range(2))
    assert first == second
    assert client.completions.create(**{**asked, "seed": 6}).choices[0].text != first


def test_a_seed_of_minus_1_is_none(client):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "seed": -1}
    assert len({client.completions.create(**asked).choices[0].text for _ in range(3)}) > 1
    asked["seed"] = -2
    assert len({client.completions.create(**asked).choices[0].text for _ in range(3)}) == 1


@pytest.mark.parametrize("skips", [True, False])
def test_offsets_are_those_of_the_text_that_was_given(client, skips):
    answer = client.completions.create(
        model="tiny",
        prompt="x<s>€",
        echo=True,
        logprobs=0,
        max_tokens=2,
        extra_body={"skip_special_tokens": skips, **ONLY_A},
    )
    choice = answer.choices[0]
    assert choice.text == "x<s>€aa"
    # The tokenizer adds <s>, which stands nowhere in the text.
    assert choice.logprobs.text_offset == [0, 0, 1, 4, 4, 4, 5, 6]


@pytest.mark.parametrize("max_tokens", [None, 1, 20])
def test_a_prompt_may_be_cut_to_what_leaves_room_for_the_answer(client, max_tokens):
    asked = {"model": "tiny", "max_tokens": max_tokens}
    body = {"truncate_prompt_tokens": -1, **ONLY_A}
    answer = client.completions.create(**asked, prompt="b" * 600, extra_body=body)
    assert answer.usage.total_tokens == 512
    assert answer.usage.completion_tokens == (max_tokens or 1)
    message = {"role": "user", "content": "b" * 600}
    answer = client.chat.completions.create(**asked, messages=[message], extra_body=body)
    assert answer.usage.total_tokens == 512
    whole = client.completions.create(**asked, prompt="abc", echo=True, extra_body=body)
    assert whole.choices[0].text.startswith("abca")
    assert whole.usage.prompt_tokens == 4


def test_a_repeated_prompt_is_found_in_the_cache(client):
    prompt = "A long prompt that fills more than one block of the cache, twice asked. " * 2
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
    answers = [client.completions.create(**asked) for _ in range(2)]
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
    assert cached[0] <= 1, "other prompts began with <s> too"
    assert cached[1] >= 32


def test_choices_are_drawn_on_their_own_and_the_first_as_if_it_were_alone(client):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "seed": 5}
    alone = client.completions.create(**asked).choices[0].text
    texts = [choice.text for choice in client.completions.create(**asked, n=3).choices]
    assert texts[0] == alone
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in client.completions.create(**asked, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_a_stop_string_ends_one_choice_of_several(client):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 30, "seed": 5, "n": 2, "logprobs": 0}
    whole = [choice.text for choice in client.completions.create(**asked).choices]
    stop = next(c for c in whole[0] if c not in whole[1] and c != "\ufffd")
    answer = client.completions.create(**asked, stop=stop)
    assert [choice.text for choice in answer.choices] == [whole[0].split(stop)[0], whole[1]]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]


def test_a_stop_string_counts_once_min_tokens_are_there(client):
    asked = {"model": "tiny", "prompt": "abc", "stop": ["a"]}
    for min_tokens in (0, 1, 4):
        answer = client.completions.create(**asked, extra_body={"min_tokens": min_tokens, **ONLY_A})
        num_tokens = max(1, min_tokens)
        assert answer.choices[0].text == "a" * (num_tokens - 1)
        assert answer.usage.completion_tokens == num_tokens


def test_tokens_behind_a_stop_string_are_counted_nowhere_however_busy_the_server_is(url):
    before = scrape(url)

    async def ask_all() -> list[openai.types.Completion]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
            asked = {"model": "tiny", "prompt": "abc", "stop": ["a"], "max_tokens": 50}
            asking = (client.completions.create(**asked, extra_body=ONLY_A) for _ in range(64))
            return await asyncio.gather(*asking)

    answers = asyncio.run(ask_all())
    assert [answer.usage.completion_tokens for answer in answers] == [1] * 64
    after = scrape(url)
    for name in ("generation_tokens_total", "request_generation_tokens_sum"):
        assert after[f"vllm:{name}"] - before[f"vllm:{name}"] == 64


def test_a_prompt_is_counted_once_however_many_choices_it_has(client, url):
    before = scrape(url)
    answer = client.completions.create(model="tiny", prompt="123456789", max_tokens=2, n=4)
    assert answer.usage.prompt_tokens == 10
    after = scrape(url)
    for name in ("prompt_tokens_total", "request_prompt_tokens_sum"):
        assert after[f"vllm:{name}"] - before[f"vllm:{name}"] == 10


def test_a_scored_prompt_has_the_logprobs_with_which_it_was_generated(client):
    prompt = list(b"xabcx")
    asked = {"model": "tiny", "temperature": 0, "logprobs": 2}
    tokens = {"extra_body": {"return_tokens_as_token_ids": True, "ignore_eos": True}}
    answer = client.completions.create(**asked, **tokens, prompt=prompt, max_tokens=6)
    drawn = answer.choices[0].logprobs
    ids = [int(token.removeprefix("token_id:")) for token in drawn.tokens]
    scored = client.completions.create(**asked, prompt=[*prompt, *ids], max_tokens=0, echo=True)
    logprobs = scored.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[-6:] == pytest.approx(drawn.token_logprobs, abs=1e-4)
    assert scored.usage.completion_tokens == 0
    assert all(
        max(top.values()) == top_1
        for top, top_1 in zip(drawn.top_logprobs, drawn.token_logprobs, strict=True)
    ), "a greedy token is the likeliest"


def test_beams_are_several_texts_best_first_and_the_same_in_a_stream(client):
    asked = {"model": "tiny", "prompt": [1, 5, 6], "max_tokens": 5}
    beams = {"use_beam_search": True, "beam_width": 4, "ignore_eos": True}
    answer = client.completions.create(**asked, n=3, extra_body=beams)
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 3
    assert answer.usage.completion_tokens == 15
    best = client.completions.create(**asked, n=1, extra_body=beams)
    assert best.choices[0].text == texts[0]
    chunks = list(client.completions.create(**asked, n=3, extra_body=beams, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == texts


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"100": 100}},
        {"allowed_token_ids": [100]},
        {"logit_bias": {"100": 100}, "n": 2},
        {"logit_bias": {"100": 100}, "min_tokens": 4, "stop_token_ids": [101]},
    ],
)
def test_a_field_that_forces_a_token_forces_it(client, fields):
    body = {"logprobs": 0, "return_tokens_as_token_ids": True, **fields}
    answer = client.completions.create(model="tiny", prompt="a", max_tokens=4, extra_body=body)
    for choice in answer.choices:
        assert choice.logprobs.tokens == ["token_id:100"] * 4


def test_a_bad_word_is_not_written(client):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    word = next(c for c in text if c.isascii() and c.strip())
    answer = client.completions.create(**asked, extra_body={"bad_words": [word]})
    assert word not in answer.choices[0].text


def test_the_best_of_several_are_the_likeliest(client):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "seed": 5, "logprobs": 0}
    body = {"ignore_eos": True}
    every = client.completions.create(**asked, n=4, extra_body=body).choices
    best = client.completions.create(**asked, n=2, best_of=4, extra_body=body).choices
    ranked = sorted(every, key=lambda choice: -sum(choice.logprobs.token_logprobs))
    assert [choice.text for choice in best] == [choice.text for choice in ranked[:2]]


def test_more_choices_than_slots_are_refused_with_both_numbers(client):
    with pytest.raises(openai.BadRequestError, match=r"n is 9; .* 8 sequences.*--max-num-seqs"):
        client.completions.create(model="tiny", prompt="a", n=9)


def test_a_cache_salt_parts_the_prefixes(client):
    prompt = "Another long prompt of several blocks, for one group of people alone. " * 2
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
    salts = ["one", "two", "one"]
    cached = [
        client.completions.create(
            **asked, extra_body={"cache_salt": salt}
        ).usage.prompt_tokens_details.cached_tokens
        for salt in salts
    ]
    assert cached[:2] == [0, 0]
    assert cached[2] >= 32


def test_a_chat_is_streamed_with_usage(client):
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    usage = [chunk.usage for chunk in stream][-1]
    assert usage.prompt_tokens == len("user: Hi\nassistant:")
    assert 1 <= usage.completion_tokens <= 8


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(client):
    with pytest.raises(openai.BadRequestError, match=r"601 tokens.*512"):
        client.completions.create(model="tiny", prompt="a" * 600)


def test_metrics_count_what_the_engine_did(client, url):
    client.completions.create(model="tiny", prompt="a", max_tokens=2)
    values = scrape(url)
    assert values["vllm:generation_tokens_total"] >= 2
    assert values["vllm:prefix_cache_queries_total"] >= 1
    assert httpx.get(f"{url}/load").json()["kv_usage"] == 0


def test_sigterm_under_load_loses_no_stream_of_the_engine(client, server, url):
    body = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        chunks = answer.iter_text()
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        rest = "".join(chunks)
    assert '"finish_reason":"length"' in rest
    assert rest.endswith("data: [DONE]\n\n")
    assert server.wait() == 0


def copy_without(folder: Path, target: Path, left_out: str) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        if path.name != left_out:
            (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("left_out", "instead", "reason", "status"),
    [
        (None, None, "ModelNotFound", 2),
        ("config.json", None, "ModelNotFound", 2),
        ("config.json", b"{", "InvalidModelConfig", 2),
        ("tokenizer.json", None, "ModelNotFound", 2),
        ("model.safetensors", b"\x00" * 100, "CorruptWeights", 1),
    ],
    ids=["no folder", "no config", "broken config", "no tokenizer", "broken weights"],
)
def test_a_folder_that_is_no_model_ends_the_server_with_one_message(
    folder, tmp_path, left_out, instead, reason, status
):
    model = tmp_path / "broken"
    if left_out is not None:
        copy_without(folder, model, left_out)
    if instead is not None:
        (model / left_out).write_bytes(instead)
    log = tmp_path / "termination-log"
    server = ServerProcess(["pagoda_runtime", "serve", str(model), *FLAGS], log)
    try:
        assert server.wait() == status
    finally:
        server.close()
    assert any("Listening" in line for line in server.lines) == (status == 1)
    words = json.loads(log.read_text())
    assert words["reason"] == reason
    assert str(model) in words["message"]
    assert "Traceback" not in "".join(server.lines)
