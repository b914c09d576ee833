"""Schemas made at random, answered by a real engine with random weights."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from random_schemas import SchemaMaker, ask_for

from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.server.testing_process import serving

pytestmark = pytest.mark.slow

NUM_SCHEMAS = 300
FLAGS = ["--kv-cache-memory-bytes", "1500000", "--max-num-seqs", "64"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    with serving(folder, *FLAGS) as url:
        yield url


async def test_finished_answers_fit_their_schemas(url):
    schemas = [SchemaMaker(seed).make() for seed in range(NUM_SCHEMAS)]
    tally = await ask_for(url, schemas, max_tokens=300)
    assert tally.wrong == []
    assert len(tally.refused) + len(tally.unfinished) < NUM_SCHEMAS / 8
    assert tally.num_valid > 3 * NUM_SCHEMAS
    preemptions = [
        line
        for line in httpx.get(f"{url}/metrics").text.splitlines()
        if "preemptions_total{" in line
    ]
    assert float(preemptions[0].split()[-1]) > 0


def test_the_openai_client_parses_a_structured_answer(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        schema = {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["n"],
            "additionalProperties": False,
        }
        answer = client.completions.create(
            model="tiny",
            prompt="How many?",
            max_tokens=100,
            temperature=1.0,
            seed=3,
            logprobs=2,
            extra_body={"structured_outputs": {"json": schema}, "min_tokens": 3},
        )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text.startswith("{")
    assert len(choice.logprobs.tokens) == answer.usage.completion_tokens


def test_stop_strings_and_bad_words_work_within_a_grammar(url):
    body = {"prompt": "a", "max_tokens": 40, "temperature": 1.0, "seed": 1}
    body |= {"guided_regex": "[ab]{8}-[ab]{8}", "stop": ["-"]}
    choice = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]
    assert (len(choice["text"]), choice["stop_reason"]) == (8, "-")
    body |= {"stop": None, "bad_words": ["a"]}
    choice = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == "bbbbbbbb-bbbbbbbb"
