"""Vectors and logits equal transformers' in fp32, on tiny random checkpoints of every kind."""

from __future__ import annotations

import random
from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.functional import cosine_similarity

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.pooling_runner import PoolingRunner
from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.models.testing import ENCODERS, make_tiny_pooled_checkpoint
from pagoda_runtime.parallel import connect
from pagoda_runtime.sampling_params import SamplingParams

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
BIDIRECTIONAL = {"use_bidirectional_attention": True, "sliding_window": 8}
# Long ones are behind every window, one is a single token.
LENGTHS = (5, 1, 40, 17)


def make_texts(seed=0):
    rng = random.Random(seed)
    return [[1, *(rng.randrange(3, 320) for _ in range(length - 1))] for length in LENGTHS]


def make_rows(texts, second_text_starts=()):
    starts = [*second_text_starts, *[0] * len(texts)]
    return [
        ScheduledRow(
            request_id=str(number),
            token_ids=token_ids,
            start=0,
            block_table=[],
            sampling_params=SamplingParams(),
            second_text_start=starts[number],
        )
        for number, token_ids in enumerate(texts)
    ]


def run(folder, texts, second_text_starts=(), **settings):
    """[num_texts, outputs] of one step."""
    config = EngineConfig(
        model=str(folder), **{"dtype": "float32", "num_threads": 1, "device": "cpu", **settings}
    )
    return numbers_of(PoolingRunner(config).submit(make_rows(texts, second_text_starts)).result())


def numbers_of(outputs):
    return torch.stack([torch.tensor(array("f", output.pooled)) for output in outputs])


@torch.no_grad()
def states_of_transformers(folder, texts):
    """The last hidden states of each text, by itself."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return [model(torch.tensor([ids])).last_hidden_state[0] for ids in texts]


def assert_alike(found, expected):
    assert found.shape == expected.shape
    assert cosine_similarity(found, expected).min() >= 0.9999
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoders_vectors_are_the_means_of_its_states(family, tmp_path):
    folder, texts = make_tiny_pooled_checkpoint(tmp_path, family), make_texts()
    expected = [states.mean(0) for states in states_of_transformers(folder, texts)]
    assert_alike(run(folder, texts), torch.stack(expected))


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoders_vectors_are_the_states_of_the_last_tokens(family, tmp_path):
    folder, texts = make_tiny_pooled_checkpoint(tmp_path, family), make_texts()
    expected = [states[-1] for states in states_of_transformers(folder, texts)]
    assert_alike(run(folder, texts), torch.stack(expected))


def test_a_decoder_that_attends_in_both_directions_equals_transformers(tmp_path):
    folder = make_tiny_pooled_checkpoint(tmp_path, "gemma3_text", modules=True, **BIDIRECTIONAL)
    texts = make_texts()
    assert_alike(run(folder, texts), dense_means(folder, texts))


def dense_means(folder, texts):
    """What sentence-transformers' modules make of the states, before they are normalized."""
    from safetensors.torch import load_file

    dense = load_file(folder / "2_Dense" / "model.safetensors")
    means = torch.stack([states.mean(0) for states in states_of_transformers(folder, texts)])
    return torch.tanh(means @ dense["linear.weight"].T + dense["linear.bias"])


def test_a_dense_module_is_applied_to_the_pooled_state(tmp_path):
    folder = make_tiny_pooled_checkpoint(tmp_path, "bert", modules=True)
    texts = make_texts()
    assert_alike(run(folder, texts), dense_means(folder, texts))


def test_a_causal_checkpoint_with_modules_embeds(tmp_path):
    from pagoda_runtime.models.testing import make_tiny_checkpoint

    make_tiny_pooled_checkpoint(tmp_path, "qwen3", modules=True)
    make_tiny_checkpoint(tmp_path, "qwen3")
    texts = make_texts()
    assert_alike(run(tmp_path, texts), dense_means(tmp_path, texts))


@pytest.mark.parametrize("family", [*ENCODERS, "llama", "qwen3", "gemma3_text"])
def test_a_classifiers_logits_equal_those_of_transformers(family, tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder, texts = make_tiny_pooled_checkpoint(tmp_path, family, num_labels=3), make_texts()
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([ids])).logits for ids in texts])
    assert_alike(run(folder, texts), expected)


def test_the_texts_of_a_pair_are_told_apart(tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder = make_tiny_pooled_checkpoint(tmp_path, "bert", num_labels=1)
    texts = make_texts()
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    types = torch.tensor([[0] * 10 + [1] * 30])
    with torch.no_grad():
        expected = model(torch.tensor([texts[2]]), token_type_ids=types).logits
        one_text = model(torch.tensor([texts[2]])).logits
    found = run(folder, texts[2:3], [10])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - one_text).abs() > 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "gemma3_text"])
def test_vectors_in_16_bits_are_about_those_in_32(family, dtype, tmp_path):
    folder, texts = make_tiny_pooled_checkpoint(tmp_path, family), make_texts()
    exact = run(folder, texts)
    found = run(folder, texts, dtype=dtype)
    assert cosine_similarity(found, exact).min() > 0.98


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
def test_two_ranks_compute_the_vectors_of_one(family, tmp_path):
    folder = make_tiny_pooled_checkpoint(tmp_path / "model", family, modules=True)
    texts = make_texts()

    def run_rank(rank):
        config = EngineConfig(
            model=str(folder), dtype="float32", device="cpu", tensor_parallel_size=2
        )
        parallel = connect(rank, 2, str(tmp_path), torch.device("cpu"), backend="gloo")
        return numbers_of(
            PoolingRunner(config, parallel=parallel).submit(make_rows(texts)).result()
        )

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(run_rank, range(2))
    assert torch.equal(first, second)
    assert_alike(first, run(folder, texts))


def test_a_deterministic_vector_has_the_same_bits_in_every_company(tmp_path):
    folder, texts = make_tiny_pooled_checkpoint(tmp_path, "bert"), make_texts()
    together = run(folder, texts, deterministic=True)
    for number, text in enumerate(texts):
        assert torch.equal(run(folder, [text], deterministic=True)[0], together[number])
