"""The offline class on a tiny random checkpoint, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pagoda_runtime
from pagoda_runtime import LLM, SamplingParams
from pagoda_runtime.errors import FatalError, PromptTooLong, RequestError
from pagoda_runtime.models.testing import make_tiny_checkpoint, write_tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ mood }}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("llama"))
    write_tiny_tokenizer(folder, TEMPLATE)
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
    assert llm.generate({"prompt": "hello"}, GREEDY)[0].outputs == from_text.outputs
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
    with pytest.raises(RequestError, match="2 prompts came with 1 sampling parameters"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(RequestError, match="2 prompts came with 3 priorities"):
        llm.generate(["a", "b"], GREEDY, priority=[1, 2, 3])
    with pytest.raises(RequestError, match=r"keys \['text'\]"):
        llm.generate({"text": "a"}, GREEDY)


def test_n_choices_differ_and_stand_in_order(llm):
    params = SamplingParams(n=4, temperature=1.5, seed=1, max_tokens=8, ignore_eos=True)
    outputs = llm.generate("hello", params)[0].outputs
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert len({tuple(output.token_ids) for output in outputs}) == 4
    assert all(len(output.token_ids) == 8 for output in outputs)
    assert llm.generate("hello", params)[0].outputs == outputs


def test_best_of_returns_those_with_the_best_mean_logprob(llm):
    settings = {"temperature": 1.5, "seed": 1, "max_tokens": 8}
    every = SamplingParams(n=4, logprobs=0, **settings)
    ranked = sorted(
        llm.generate("hello", every)[0].outputs,
        key=lambda output: output.cumulative_logprob / len(output.token_ids),
        reverse=True,
    )
    best = llm.generate("hello", SamplingParams(n=2, best_of=4, **settings))[0].outputs
    assert [output.token_ids for output in best] == [output.token_ids for output in ranked[:2]]
    assert [output.index for output in best] == [0, 1]
    assert best[0].cumulative_logprob == pytest.approx(ranked[0].cumulative_logprob)
    assert best[0].logprobs is None


def test_a_stop_string_ends_one_choice_and_the_others_go_on(llm):
    settings = {"n": 4, "temperature": 1.0, "seed": 3, "max_tokens": 30, "ignore_eos": True}
    free = llm.generate("hello", SamplingParams(**settings))[0].outputs
    letter = next(c for c in free[0].text if c.isascii() and c not in free[1].text)
    params = SamplingParams(**settings, stop=(letter,))
    stopped = llm.generate("hello", params)[0].outputs
    assert stopped[0].text == free[0].text[: free[0].text.index(letter)]
    assert (stopped[0].finish_reason, stopped[0].stop_reason) == ("stop", letter)
    assert stopped[0].token_ids == free[0].token_ids[: len(stopped[0].token_ids)]
    assert stopped[1] == free[1]
    # The best of them are told by the tokens that are kept.
    every = SamplingParams(**settings, stop=(letter,), logprobs=0)
    means = [
        output.cumulative_logprob / len(output.token_ids)
        for output in llm.generate("hello", every)[0].outputs
    ]
    best = SamplingParams(**{**settings, "n": 1}, best_of=4, stop=(letter,))
    output = llm.generate("hello", best)[0].outputs[0]
    assert output.token_ids == stopped[means.index(max(means))].token_ids


def test_logprobs_of_output_and_prompt_are_told_by_token_id(llm):
    params = SamplingParams(
        temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1
    )
    result = llm.generate("hello", params)[0]
    output = result.outputs[0]
    assert len(output.logprobs) == 4
    for token_id, logprobs in zip(output.token_ids, output.logprobs, strict=True):
        assert len(logprobs) == 2
        assert logprobs[token_id].rank == 1, "greedy takes the likeliest"
        assert logprobs[token_id].logprob == max(p.logprob for p in logprobs.values())
    total = sum(p[i].logprob for i, p in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(total)
    assert result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == len(result.prompt_token_ids)
    token_id = result.prompt_token_ids[2]
    assert result.prompt_logprobs[2][token_id].decoded_token == "e"


def test_beams_come_best_first_and_the_first_one_is_never_worse_than_greedy(llm):
    greedy = SamplingParams(temperature=0.0, max_tokens=6, logprobs=0)
    (result,) = llm.beam_search("hello", 4, 6, length_penalty=0.0)
    scores = [output.cumulative_logprob for output in result.outputs]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    assert scores[0] >= llm.generate("hello", greedy)[0].outputs[0].cumulative_logprob - 1e-4
    assert result.outputs[0].text
    both = llm.beam_search(["hello", "world"], 4, 6, length_penalty=0.0)
    assert both[0].outputs == result.outputs


def test_a_chat_is_the_rendered_prompt_without_a_second_bos(llm):
    conversation = [{"role": "user", "content": "Hi"}]
    (result,) = llm.chat(conversation, GREEDY)
    assert result.prompt == "user: Hi\nassistant:"
    assert len(result.prompt_token_ids) == len(result.prompt)
    many = llm.chat([conversation, conversation * 2], GREEDY)
    assert many[0].outputs == result.outputs
    assert many[1].prompt == "user: Hi\nuser: Hi\nassistant:"


def test_a_chat_takes_another_template_and_variables(llm):
    conversation = [{"role": "user", "content": "Hi"}]
    options = {"add_generation_prompt": False, "chat_template_kwargs": {"mood": "calm"}}
    assert llm.chat(conversation, GREEDY, **options)[0].prompt == "user: Hi\ncalm"
    other = llm.chat(conversation, GREEDY, chat_template="{{ messages[0].content }}")
    assert other[0].prompt == "Hi"
    with pytest.raises(RequestError, match="refuses these messages"):
        llm.chat(conversation, GREEDY, chat_template="{{ raise_exception('no') }}")


def test_a_model_without_a_template_says_what_to_do(llm, monkeypatch):
    monkeypatch.setattr(llm._tokenizer, "chat_template", None)
    with pytest.raises(RequestError, match=r"Pass chat_template=\.\.\., or use generate"):
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY)


def test_bad_words_are_not_said(llm):
    free = llm.generate("hello", GREEDY)[0].outputs[0]
    word = next(c for c in free.text if c.isascii() and not c.isspace())
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, bad_words=(word,))
    assert word not in llm.generate("hello", params)[0].outputs[0].text


def test_a_prefix_is_shared_only_under_the_same_salt(llm):
    prompt = "a prefix of more than two blocks, to be found in the cache " * 2
    salted = [llm.generate(prompt, GREEDY, cache_salt=salt)[0] for salt in ("x", "x", "y")]
    cached = [result.num_cached_tokens for result in salted]
    assert cached[0] == 0
    assert cached[1] > 60
    assert cached[2] == 0
    assert salted[0].outputs == salted[1].outputs == salted[2].outputs


def test_a_bar_shows_progress_on_standard_error_unless_it_is_not_wanted(llm, capsys):
    llm.generate(["a", "b"], GREEDY)
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert "output: " in shown.err
    assert shown.out == ""
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


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
