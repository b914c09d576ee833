"""POST /tokenize and /detokenize, and prompts that are filled in the middle."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from pagoda_runtime.models.testing import write_tiny_tokenizer
from pagoda_runtime.server.testing import make_config, make_state, running_server
from pagoda_runtime.tokenizer.tokenizer import load_tokenizer

MESSAGES = [{"role": "system", "content": "a"}, {"role": "user", "content": "é?"}]


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def refused(http: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    answer = await http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


async def test_a_prompt_becomes_its_tokens(http):
    assert await post(http, "/tokenize", model="tiny", prompt="hé") == {
        "count": 3,
        "max_model_len": 128,
        "tokens": [104, 195, 169],
        "token_strs": None,
    }


async def test_tokens_come_as_the_vocabulary_writes_them_where_that_is_asked(http):
    answer = await post(http, "/tokenize", prompt="hi", return_token_strs=True)
    assert answer["token_strs"] == ["h", "i"]


async def test_special_tokens_are_left_out_where_that_is_asked(http, state, tmp_path):
    write_tiny_tokenizer(tmp_path)
    state.tokenizer = load_tokenizer(tmp_path)
    with_bos = await post(http, "/tokenize", prompt="a", return_token_strs=True)
    assert with_bos["token_strs"] == ["<s>", "a"]
    without = await post(http, "/tokenize", prompt="a", add_special_tokens=False)
    assert without["tokens"] == with_bos["tokens"][1:]
    assert (await post(http, "/detokenize", tokens=with_bos["tokens"]))["prompt"] == "<s>a"


async def test_a_completion_may_leave_the_special_tokens_out(http, engine, state, tmp_path):
    write_tiny_tokenizer(tmp_path)
    state.tokenizer = load_tokenizer(tmp_path)
    for asked in (None, True, False):
        body = {"prompt": "a", "max_tokens": 1, "add_special_tokens": asked}
        await post(http, "/v1/completions", **body)
    with_bos, same, without = engine.prompts.values()
    assert with_bos == same == [1, *without]


async def test_a_chat_has_the_special_tokens_of_its_template_alone_unless_more_are_asked(
    http, engine, state, tmp_path
):
    write_tiny_tokenizer(tmp_path, "<s>{{ messages[0].content }}")
    state.tokenizer = load_tokenizer(tmp_path)
    for asked in (None, False, True):
        body = {"messages": MESSAGES, "max_tokens": 1, "add_special_tokens": asked}
        await post(http, "/v1/chat/completions", **body)
    plain, same, more = engine.prompts.values()
    assert (plain, more) == (same, [1, *same])


async def test_a_conversation_has_the_tokens_that_the_engine_gets_for_it(http, engine):
    fields = {"messages": MESSAGES, "max_completion_tokens": 1, "temperature": 0.5}
    counted = await post(http, "/tokenize", **fields)
    await post(http, "/v1/chat/completions", **fields)
    assert list(engine.prompts.values()) == [counted["tokens"]]
    assert counted["count"] == len(counted["tokens"])


async def test_tokens_become_their_text_again(http):
    tokens = (await post(http, "/tokenize", prompt="héllo"))["tokens"]
    assert await post(http, "/detokenize", tokens=tokens) == {"prompt": "héllo"}
    assert await post(http, "/detokenize", tokens=[]) == {"prompt": ""}


@pytest.mark.parametrize("wrong", [-1, 256])
async def test_a_token_that_the_model_does_not_have_is_refused(http, wrong):
    error = await refused(http, "/detokenize", tokens=[1, wrong])
    assert error["param"] == "tokens"
    assert str(wrong) in error["message"]
    assert "255" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        ({"prompt": "a" * 200}, "prompt"),
    ],
)
async def test_a_wrong_field_is_named(http, body, param):
    assert (await refused(http, "/tokenize", **body))["param"] == param


async def test_both_routes_ask_for_a_key_where_there_are_keys(engine):
    state = make_state(engine, make_config("--api-key", "k"))
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
            assert (await http.post(path, json=body)).status_code == 401
            headers = {"authorization": "Bearer k"}
            assert (await http.post(path, json=body, headers=headers)).status_code == 200


async def test_a_suffix_is_written_with_the_models_markers(http, engine, state):
    state.tokenizer.infill_format = "<P>{prefix}<S>{suffix}<M>"
    fields = {"prompt": ["{a}", "b"], "suffix": "{prefix}", "max_tokens": 1}
    await post(http, "/v1/completions", **fields)
    texts = [bytes(prompt).decode() for prompt in engine.prompts.values()]
    assert texts == ["<P>{a}<S>{prefix}<M>", "<P>b<S>{prefix}<M>"]


async def test_an_empty_suffix_asks_for_nothing(http, engine):
    await post(http, "/v1/completions", prompt="{a}", suffix="", max_tokens=1)
    assert list(engine.prompts.values()) == [list(b"{a}")]


async def test_a_suffix_is_refused_where_it_cannot_be_served(http, state):
    error = await refused(http, "/v1/completions", prompt="a", suffix="b")
    assert error["param"] == "suffix"
    assert "fill in the middle" in error["message"]
    state.tokenizer.infill_format = "<P>{prefix}<S>{suffix}<M>"
    for body, param in (
        ({"prompt": [97]}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"prompt": "a", "suffix": "b" * 200}, "prompt"),
    ):
        error = await refused(http, "/v1/completions", **{"suffix": "b", **body})
        assert error["param"] == param
    chat = {"messages": MESSAGES, "suffix": "b"}
    assert (await refused(http, "/v1/chat/completions", **chat))["param"] == "suffix"
