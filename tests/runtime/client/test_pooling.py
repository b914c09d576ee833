"""What is made of a pooler's numbers."""

from __future__ import annotations

import math
from array import array

import pytest

from pagoda_runtime.client.pooling import (
    find_prompt,
    score_pairs,
    scorer_of,
    to_probabilities,
    to_vector,
    verify_dimensions,
)
from pagoda_runtime.errors import RequestError
from pagoda_runtime.ipc.messages import PoolerFacts
from pagoda_runtime.server.testing import READY

EMBEDDER = PoolerFacts(task="embed", size=4, is_normalized=True, dimensions=[2])
PROMPTS = PoolerFacts(
    task="embed", size=4, prompts={"query": "q: ", "passage": "p: "}, default_prompt="query"
)


def packed(*numbers: float) -> bytes:
    return array("f", numbers).tobytes()


def classifier(size: int, activation: str) -> PoolerFacts:
    return PoolerFacts(task="classify", size=size, activation=activation)


def test_a_vector_is_cut_and_then_normalized():
    assert to_vector(packed(3, 4, 12, 0), EMBEDDER).tolist() == pytest.approx(
        [3 / 13, 4 / 13, 12 / 13, 0]
    )
    assert to_vector(packed(3, 4, 12, 0), EMBEDDER, 2).tolist() == pytest.approx([0.6, 0.8])


def test_a_vector_of_zeros_stays_one():
    assert to_vector(packed(0, 0, 0, 0), EMBEDDER).tolist() == [0, 0, 0, 0]


def test_only_sizes_that_the_model_names_are_accepted():
    for size in (None, 2, 4):
        verify_dimensions(size, EMBEDDER)
    with pytest.raises(RequestError, match="dimensions is 3; of this model it must be one of 2, 4"):
        verify_dimensions(3, EMBEDDER)


def test_probabilities_are_what_the_activation_makes_of_logits():
    softmax = to_probabilities(packed(1000, 1001), classifier(2, "softmax"))
    assert softmax == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    sigmoid = to_probabilities(packed(-1000, 0), classifier(2, "sigmoid"))
    assert sigmoid == pytest.approx([0.0, 0.5])
    assert to_probabilities(packed(7, 8), classifier(2, "softmax"), activates=False) == [7, 8]


def test_prompts_are_found_by_name_by_kind_and_by_default():
    assert find_prompt(PROMPTS, "passage", None) == "p: "
    assert find_prompt(PROMPTS, None, "search_document") == "p: "
    assert find_prompt(PROMPTS, None, None) == "q: "
    assert find_prompt(EMBEDDER, None, None) == ""
    with pytest.raises(RequestError, match="such prompt"):
        find_prompt(PROMPTS, "document", None)


def test_one_text_is_scored_with_each_of_several():
    inputs, finish = score_pairs(PROMPTS, ["a"], ["b", "c"])
    assert inputs == [("q: a",), ("p: b",), ("p: c",)]
    assert finish([packed(1, 0), packed(1, 0), packed(0, 2)]) == pytest.approx([1, 0])
    inputs, _ = score_pairs(classifier(1, "sigmoid"), ["a"], ["b", "c"])
    assert inputs == [("a", "b"), ("a", "c")]


def test_a_classifier_of_several_classes_scores_nothing():
    from msgspec.structs import replace

    with pytest.raises(RequestError, match="3 classes"):
        scorer_of(replace(READY, pooler=classifier(3, "softmax")))
