"""What one request may take of the server that all share: memory, threads and the event loop."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from typing import Any

import httpx
import msgspec
import pytest

from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.state import MAX_WARNED_FIELDS, ServerState
from pagoda_runtime.server.testing import (
    READY,
    ByteTokenizer,
    FakeEngine,
    make_config,
    make_state,
)
from pagoda_runtime.tokenizer.detokenizer import IncrementalDetokenizer


class CountingTokenizer(ByteTokenizer):
    """Counts the characters that it was asked to tokenize, and knows in which threads."""

    def __init__(self, encode_seconds: float = 0.0, longest_token: int = 1) -> None:
        super().__init__(encode_seconds, longest_token)
        self.num_characters = 0
        self.threads: set[threading.Thread] = set()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.threads.add(threading.current_thread())
        self.num_characters += len(text)
        return super().encode(text, add_special_tokens)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(make_config("--max-num-seqs", "8", "--max-num-waiting", "12").engine)


@pytest.fixture
def tokenizer() -> CountingTokenizer:
    return CountingTokenizer(longest_token=10)


@pytest.fixture
def state(engine: FakeEngine, tokenizer: CountingTokenizer) -> ServerState:
    state = make_state(engine, make_config("--max-num-seqs", "8", "--max-num-waiting", "12"))
    state.tokenizer = tokenizer
    return state


async def complete(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **fields})


def message_of(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text[:500]
    message: str = answer.json()["error"]["message"]
    return message


async def test_prompts_times_choices_fit_the_slots_and_the_queue(http, engine):
    message = message_of(await complete(http, prompt=[[5]] * 3, n=7))
    for words in ("3 prompts of 7 choices", "21 sequences", "at most 20", "runs 8", "lets 12 wait"):
        assert words in message
    assert not engine.prompts
    assert len((await complete(http, prompt=[[5]] * 4, n=5)).json()["choices"]) == 20


async def test_beams_count_as_choices(http):
    message = message_of(await complete(http, prompt=[[5]] * 3, use_beam_search=True, n=7))
    assert "21 sequences" in message


async def test_ids_that_go_with_each_prompt_are_bounded_in_sum(http, engine):
    allowed = {"allowed_token_ids": [1] * 60_000}
    message = message_of(await complete(http, prompt=[[5]] * 18, **allowed))
    for words in ("60000 tokens", "18 prompts", "1048576 fit"):
        assert words in message
    assert not engine.prompts
    assert (await complete(http, prompt=[[5]] * 2, **allowed)).status_code == 200


def test_choices_share_the_ids_that_give_no_text():
    tokenizer = ByteTokenizer()
    tokenizer.all_special_ids = frozenset(range(100_000))
    tracemalloc.start()
    try:
        for params in (SamplingParams(), SamplingParams(stop_token_ids=(3,))):
            choices = [IncrementalDetokenizer(tokenizer, params)]
            before = tracemalloc.get_traced_memory()[0]
            choices += [IncrementalDetokenizer(tokenizer, params) for _ in range(100)]
            assert tracemalloc.get_traced_memory()[0] - before < 500_000
            assert choices[-1].push((3, 70)) == choices[0].push((3, 70)) == ""
    finally:
        tracemalloc.stop()


async def test_many_short_prompts_are_tokenized_off_the_loop(http, engine, tokenizer):
    assert (await complete(http, prompt="a" * 120)).status_code == 200
    assert tokenizer.threads == {threading.main_thread()}
    tokenizer.threads.clear()
    assert (await complete(http, prompt=["a" * 120] * 20)).status_code == 200
    assert tokenizer.threads
    assert threading.main_thread() not in tokenizer.threads
    assert engine.num_finished == 21


async def test_bad_words_are_tokenized_off_the_loop(http, tokenizer):
    assert (await complete(http, bad_words=["a" * 100] * 100)).status_code == 200
    assert len(tokenizer.threads) == 2


async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(http, tokenizer):
    for path, body in (
        ("completions", {"prompt": "a" * 1281}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 1281}]}),
    ):
        message = message_of(await http.post(f"/v1/{path}", json=body))
        for words in ("1281 characters", "at most 1280", "128 tokens", "10 characters"):
            assert words in message
    assert tokenizer.num_characters == 0


async def test_a_truncated_prompt_is_cut_before_it_is_tokenized(http, engine, tokenizer):
    text = "b" * 1_000_000 + "cd"
    answer = await complete(http, prompt=text, truncate_prompt_tokens=3)
    assert answer.status_code == 200
    assert list(engine.prompts.values()) == [list(b"bcd")]
    assert tokenizer.num_characters < 1000
    # More than fits is no truncation.
    message_of(await complete(http, prompt=text, truncate_prompt_tokens=2**31 - 1))


async def test_tokenizing_ends_as_soon_as_the_tokens_are_too_many(http, state, tokenizer):
    tokenizer.longest_token = 100_000
    message = message_of(await complete(http, prompt="a" * 1_000_000))
    for words in ("1000000 characters", "first 32768", "32752 tokens", "holds 128"):
        assert words in message
    assert tokenizer.num_characters == 32768


async def test_a_client_that_leaves_ends_the_tokenizing_of_its_prompt(http, state, engine):
    engine.ready = msgspec.structs.replace(READY, max_model_len=10**6, num_blocks=10**6)
    tokenizer = state.tokenizer = CountingTokenizer(encode_seconds=0.05, longest_token=100)
    body = {"prompt": "a" * 8_000_000}
    client = asyncio.create_task(http.post("/v1/completions", json=body, timeout=60))
    while not tokenizer.num_characters:
        await asyncio.sleep(0.001)
    client.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client
    while state.num_requests:
        await asyncio.sleep(0.01)
    # Of a million, after which it would be refused.
    assert tokenizer.num_characters < 500_000


async def test_a_short_text_does_not_wait_for_a_long_one(http, state, engine):
    engine.ready = msgspec.structs.replace(READY, max_model_len=40_000, num_blocks=40_000)
    is_answered = threading.Event()

    class PatientTokenizer(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            if len(text) > 3000:
                is_answered.wait(10)
            return super().encode(text, add_special_tokens)

    state.tokenizer = PatientTokenizer()
    long = asyncio.create_task(complete(http, prompt="a" * 35_000))
    while not state.num_tokenizing:
        await asyncio.sleep(0.001)
    assert (await complete(http, prompt="a" * 3000)).status_code == 200
    assert not long.done()
    is_answered.set()
    assert (await long).status_code == 200


async def test_of_unknown_field_names_little_is_kept(http, state):
    for number in range(20):
        await complete(http, model="no", **{f"{number}" + "x" * 100_000: 1})
    assert len(state.warned_fields) == 20
    assert sum(map(len, state.warned_fields)) <= 2000
    await complete(http, **{f"field_{number}": 1 for number in range(2 * MAX_WARNED_FIELDS)})
    assert len(state.warned_fields) == MAX_WARNED_FIELDS


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "m" * 100_000},
        {"seed": int("9" * 4300)},
        {"max_tokens": int("9" * 4300)},
        {"stop_token_ids": [int("9" * 4300)]},
        {"allowed_token_ids": [int("9" * 300)]},
        {"logit_bias": {"9" * 4300: 1}},
        {"logit_bias": {"k" * 100_000: "high"}},
        {"cache_salt": "s" * 100_000},
        {"temperature": "t" * 100_000},
    ],
)
async def test_an_error_repeats_little_of_what_was_sent(http, fields):
    answer = await complete(http, **fields)
    assert answer.status_code in (400, 404)
    assert len(answer.content) < 2600


async def test_an_error_of_an_unknown_path_repeats_little_of_it(http):
    answer = await http.get("/" + "p" * 10_000)
    assert answer.status_code == 404
    assert len(answer.content) < 2600
