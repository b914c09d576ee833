"""Embeddings, scores and classes over HTTP, by tiny random checkpoints in real servers."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch

from pagoda_runtime.models.testing import make_tiny_pooled_checkpoint
from pagoda_runtime.server.testing import FakeEngine, make_config, make_state
from pagoda_runtime.server.testing import running_server as serve_fake
from pagoda_runtime.server.testing_process import ServerProcess

FLAGS = ["--host", "127.0.0.1", "--port", "0", "--num-threads", "1", "--served-model-name", "tiny"]
FLAGS += ["--max-num-seqs", "8", "--max-num-waiting", "24", "--drain-delay-seconds", "0"]


def start(folder: Path) -> ServerProcess:
    command = ["pagoda_runtime", "serve", str(folder), *FLAGS]
    return ServerProcess(command, folder.parent / "termination-log")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding model with sentence-transformers' files, whose vectors may be cut."""
    folder = tmp_path_factory.mktemp("models") / "embedder"
    return make_tiny_pooled_checkpoint(folder, "bert", modules=True, is_matryoshka=True)


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "cross-encoder"
    return make_tiny_pooled_checkpoint(folder, "bert", num_labels=1)


@pytest.fixture(scope="module")
def servers(folder: Path, cross_encoder: Path) -> Iterator[list[ServerProcess]]:
    servers = [start(folder), start(cross_encoder)]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def url(servers: list[ServerProcess]) -> str:
    return servers[0].wait_until_ready()


@pytest.fixture(scope="module")
def scorer_url(servers: list[ServerProcess]) -> str:
    return servers[1].wait_until_ready()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def vectors_of(client: openai.OpenAI, texts: object, **fields: object) -> np.ndarray:
    answer = client.embeddings.create(model="tiny", input=texts, **fields)
    return np.array([each.embedding for each in answer.data])


@torch.no_grad()
def expected_vectors(folder: Path, texts: list[str]) -> np.ndarray:
    """By transformers and what the modules' names say."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    dense = load_file(folder / "2_Dense" / "model.safetensors")
    found = []
    for text in texts:
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vector = torch.tanh(states.mean(0) @ dense["linear.weight"].T + dense["linear.bias"])
        found.append((vector / vector.norm()).numpy())
    return np.array(found)


def ask(url: str, path: str, status: int = 200, **body: object) -> dict:
    answer = httpx.post(f"{url}/v1/{path}", json=body, timeout=30)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_the_openai_client_gets_what_transformers_computes(client, folder):
    texts = ["abc", "a longer text", "é", "x" * 60]
    found = vectors_of(client, texts)
    assert np.sum(found * expected_vectors(folder, texts), axis=1).min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)


def test_usage_counts_special_tokens(client):
    usage = client.embeddings.create(model="tiny", input=["abc", "d"]).usage
    assert (usage.prompt_tokens, usage.total_tokens) == (5 + 3, 5 + 3)


def test_base64_has_the_numbers_in_fp32(url):
    body = {"input": "abc", "encoding_format": "base64"}
    shown = ask(url, "embeddings", **body)["data"][0]["embedding"]
    numbers = struct.unpack("<32f", base64.b64decode(shown))
    expected = ask(url, "embeddings", input="abc")["data"][0]["embedding"]
    assert numbers == pytest.approx(expected, abs=1e-7)


def test_token_ids_are_taken_as_they_are(client):
    ids = [1, 67, 68, 69, 2]
    np.testing.assert_allclose(
        vectors_of(client, [ids, ids[:4]])[0], vectors_of(client, ids)[0], atol=1e-6
    )


def test_a_vector_is_cut_to_the_dimensions_and_normalized_again(client):
    whole, cut = (vectors_of(client, "abc", dimensions=size)[0] for size in (32, 8))
    np.testing.assert_allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)


@pytest.mark.parametrize("dimensions", [33, 0])
def test_dimensions_that_a_vector_does_not_have_are_refused(url, dimensions):
    error = ask(url, "embeddings", 400, input="a", dimensions=dimensions)["error"]
    assert error["param"] == "dimensions"


@pytest.mark.parametrize("field", [{"prompt_name": "query"}, {"input_type": "search_query"}])
def test_a_prompt_stands_before_the_text(client, field):
    found = vectors_of(client, "abc", extra_body=field)
    np.testing.assert_allclose(found, vectors_of(client, "find: abc"), atol=1e-6)


def test_an_unknown_prompt_is_refused_with_the_known_ones(url):
    error = ask(url, "embeddings", 400, input="a", prompt_name="poem")["error"]
    assert "It has: query, document" in error["message"]


def test_a_text_that_is_too_long_is_refused_with_both_numbers(url):
    error = ask(url, "embeddings", 400, input=["ab", "x" * 63])["error"]
    assert error["code"] == "context_length_exceeded"
    assert "65 tokens; at most 64" in error["message"]


@pytest.mark.parametrize(("kept", "text"), [(-1, "x" * 62), (10, "x" * 8)])
def test_truncation_keeps_the_beginning_and_the_special_tokens(client, kept, text):
    found = vectors_of(client, "x" * 500, extra_body={"truncate_prompt_tokens": kept})
    np.testing.assert_allclose(found, vectors_of(client, text), atol=1e-5)


def test_many_clients_share_steps_and_get_their_own(client, url):
    texts = [chr(97 + number) * (number + 1) for number in range(16)]
    together = vectors_of(client, texts)
    with ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda text: vectors_of(client, text)[0], texts))
    np.testing.assert_allclose(together, alone, atol=1e-5)
    load = httpx.get(f"{url}/load").json()
    assert load["finished_total"] >= 32
    assert (load["running"], load["waiting"], load["kv_usage"]) == (0, 0, 0.0)
    metrics = httpx.get(f"{url}/metrics").text
    assert 'vllm:e2e_request_latency_seconds_count{model_name="tiny"}' in metrics
    assert 'finished_reason="stop"} 0.0' not in metrics


def test_more_texts_than_the_server_ever_holds_are_refused(url):
    error = ask(url, "embeddings", 400, input=["a"] * 33)["error"]
    assert "33 texts; this server takes at most 32" in error["message"]


def test_scores_of_an_embedding_model_are_cosines(url, client):
    one, two, other = vectors_of(client, ["find: ab", "ab", "zzz"])
    answer = ask(url, "score", text_1="ab", text_2=["ab", "zzz"])
    found = [each["score"] for each in answer["data"]]
    assert found == pytest.approx([one @ two, one @ other], abs=1e-5)


@torch.no_grad()
def expected_scores(folder: Path, query: str, documents: list[str]) -> list[float]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    pairs = [tokenizer(query, document, return_tensors="pt") for document in documents]
    return [torch.sigmoid(model(**pair).logits)[0, 0].item() for pair in pairs]


def test_a_cross_encoders_scores_are_transformers(scorer_url, cross_encoder):
    documents = ["some text", "q", "something else that is longer"]
    expected = expected_scores(cross_encoder, "a query", documents)
    answer = ask(scorer_url, "score", text_1="a query", text_2=documents)
    assert [each["score"] for each in answer["data"]] == pytest.approx(expected, abs=1e-4)
    same = ask(scorer_url, "score", queries=["a query"] * 3, documents=documents)
    assert [each["score"] for each in same["data"]] == pytest.approx(expected, abs=1e-4)


def test_documents_are_ranked_by_their_scores(scorer_url, cross_encoder):
    documents = ["some text", "q", "something else that is longer"]
    scores = expected_scores(cross_encoder, "a query", documents)
    sent = [documents[0], {"text": documents[1]}, documents[2]]
    answer = ask(scorer_url, "rerank", query="a query", documents=sent, top_n=2)
    best = sorted(range(3), key=lambda index: -scores[index])[:2]
    assert [each["index"] for each in answer["results"]] == best
    assert [each["document"]["text"] for each in answer["results"]] == [documents[i] for i in best]
    found = [each["relevance_score"] for each in answer["results"]]
    assert found == pytest.approx([scores[index] for index in best], abs=1e-4)
    bare = ask(scorer_url, "rerank", query="q", documents=["a"], return_documents=False)
    assert "document" not in bare["results"][0]


def test_classes_have_labels_and_probabilities(scorer_url):
    answer = ask(scorer_url, "classify", input=["abc", "d"])
    (first, _) = answer["data"]
    assert (first["label"], first["num_classes"]) == ("LABEL_0", 1)
    logit = ask(scorer_url, "classify", input="abc", use_activation=False)["data"][0]["probs"][0]
    assert first["probs"][0] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("responses", {"input": "a"}),
        ("messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}),
        ("classify", {"input": "a"}),
    ],
)
def test_what_an_embedding_model_cannot_do_is_refused_by_name(url, path, body):
    message = ask(url, path, 400, **body)["error"]["message"]
    assert "This model embeds texts" in message
    assert "/v1/embeddings" in message


async def test_a_model_that_generates_embeds_nothing():
    config = make_config()
    state = make_state(FakeEngine(config.engine), config)
    async with serve_fake(state) as fake, httpx.AsyncClient(base_url=fake) as client:
        answer = await client.post("/v1/embeddings", json={"input": "a"})
    assert answer.status_code == 400
    assert "This model generates text" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("embeddings", {"input": []}, "input"),
        ("embeddings", {"input": [""], "model": "other"}, "model"),
        ("embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("embeddings", {"input": [[1, 400]]}, "input"),
        ("embeddings", {"input": [[1]], "prompt_name": "query"}, "input"),
        ("embeddings", {"input": "a", "messages": [1]}, "messages"),
        ("score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ("score", {"text_1": "a"}, "text_2"),
        ("rerank", {"query": "a", "documents": []}, "documents"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(url, path, body, param):
    answer = httpx.post(f"{url}/v1/{path}", content=json.dumps(body))
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_the_server_says_what_it_is_for(url, scorer_url):
    tasks = [httpx.get(f"{each}/startup").json()["model"]["task"] for each in (url, scorer_url)]
    assert tasks == ["embed", "classify"]
