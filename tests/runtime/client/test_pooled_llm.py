"""Vectors and scores by the offline class, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pagoda_runtime import LLM
from pagoda_runtime.client.pooling import cosine
from pagoda_runtime.errors import PromptTooLong, RequestError
from pagoda_runtime.models.testing import make_tiny_pooled_checkpoint

FLAGS = {"device": "cpu", "num_threads": 1, "max_num_seqs": 4, "max_num_waiting": 2}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = make_tiny_pooled_checkpoint(tmp_path_factory.mktemp("bert"), "bert", modules=True)
    with LLM(str(folder), **FLAGS) as llm:
        yield llm


def test_more_texts_than_the_queue_holds_come_back_in_order(llm):
    texts = ["x" * (number + 1) for number in range(20)]
    together = llm.embed(texts)
    assert len(together) == 20
    assert list(together[7]) == pytest.approx(list(llm.embed(texts[7])[0]), abs=1e-5)


def test_a_prompt_stands_before_the_text(llm):
    (found,), (expected,) = llm.embed("abc", prompt_name="query"), llm.embed("find: abc")
    assert list(found) == pytest.approx(list(expected), abs=1e-6)


def test_a_long_text_is_refused_or_cut(llm):
    with pytest.raises(PromptTooLong, match="82 tokens; at most 64"):
        llm.embed("x" * 80)
    (found,), (expected,) = llm.embed("x" * 80, truncate=True), llm.embed("x" * 62)
    assert list(found) == pytest.approx(list(expected), abs=1e-6)


def test_scores_are_cosines(llm):
    query, document = llm.embed(["find: a", "b"])
    assert llm.score("a", ["b"]) == pytest.approx([cosine(query, document)], abs=1e-5)


def test_a_model_that_embeds_neither_generates_nor_classifies(llm):
    for call in (llm.generate, llm.classify):
        with pytest.raises(RequestError, match="This model embeds texts"):
            call("a")
