"""The offline class on a tiny random checkpoint, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pagoda_runtime
from pagoda_runtime import LLM, SamplingParams
from pagoda_runtime.errors import FatalError, PromptTooLong, RequestError
from pagoda_runtime.models.testing import make_tiny_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("llama"))
    flags = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 128,
        "max_num_seqs": 4,
        "num_threads": 1,
    }
    flags |= {"kv_cache_memory_bytes": 2**22, "max_num_waiting": 2}
    with LLM(str(folder), **flags) as llm:
        yield llm


def test_a_string_and_its_token_ids_give_the_same_tokens(llm):
    from_text = llm.generate("hello", GREEDY)[0]
    from_ids = llm.generate({"prompt_token_ids": from_text.prompt_token_ids}, GREEDY)[0]
    assert from_text.prompt == "hello"
    assert from_ids.prompt is None
    assert from_text.outputs == from_ids.outputs
    output = from_text.outputs[0]
    assert (len(output.token_ids), output.finish_reason, output.logprobs) == (8, "length", None)


def test_more_prompts_than_the_queue_holds_come_back_in_order(llm):
    prompts = [f"prompt {i}" for i in range(20)]
    results = llm.generate(prompts, [GREEDY] * 20)
    assert [result.prompt for result in results] == prompts
    assert results[7].outputs == llm.generate(prompts[7], GREEDY)[0].outputs


def test_a_stop_string_ends_the_text_before_it(llm):
    prompts = [f"prompt {i}" for i in range(20)]
    whole = next(
        result
        for result in llm.generate(prompts, GREEDY)
        if len(result.outputs[0].text) > 2 and result.outputs[0].text.isprintable()
    )
    text = whole.outputs[0].text
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, stop=(text[-1],))
    output = llm.generate(whole.prompt, params)[0].outputs[0]
    assert output.text == text[: text.index(text[-1])]
    assert (output.finish_reason, output.stop_reason) == ("stop", text[-1])


def test_without_parameters_the_defaults_of_the_model_count(llm):
    assert len(llm.generate(["hello"])) == 1


def test_a_prompt_that_is_too_long_stops_the_call_before_anything_runs(llm):
    with pytest.raises(PromptTooLong, match="max_model_len 128"):
        llm.generate([{"prompt_token_ids": [5]}, {"prompt_token_ids": [5] * 128}], GREEDY)


def test_parameters_and_prompts_of_different_number_are_refused(llm):
    with pytest.raises(RequestError, match="2 prompts came with 1"):
        llm.generate(["a", "b"], [GREEDY])


def test_an_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="'max_model_length'"):
        LLM("anything", max_model_length=3)


def test_a_folder_that_does_not_exist_is_a_fatal_error_with_the_engines_words(tmp_path):
    with pytest.raises(FatalError) as error:
        LLM(str(tmp_path / "missing"), device="cpu")
    assert error.value.reason == "ModelNotFound"
    assert str(tmp_path / "missing") in error.value.message


def test_the_package_exports_what_the_readme_shows():
    assert pagoda_runtime.__all__ == ["LLM", "SamplingParams"]
    with pytest.raises(AttributeError, match="nothing_like_it"):
        pagoda_runtime.nothing_like_it  # noqa: B018
