"""Chat templates of checkpoints behind the real HTTP server, with a real tokenizer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from pagoda_runtime.models.testing import write_tiny_tokenizer
from pagoda_runtime.server.testing import READY, FakeEngine, make_config, make_state, running_server
from pagoda_runtime.tokenizer.tokenizer import load_tokenizer

PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


async def chat(
    folder: Path,
    template: str | None,
    content: object,
    *,
    fields: Mapping[str, Any] | None = None,
    flags: Sequence[str] = (),
    **settings: object,
) -> tuple[httpx.Response, list[str]]:
    """The answer, and the prompts that came to the engine."""
    write_tiny_tokenizer(folder, template)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    config = make_config(*flags)
    engine = FakeEngine(config.engine)
    engine.ready = msgspec.structs.replace(READY, vocab_size=300)
    state = make_state(engine, config)
    state.tokenizer = tokenizer = load_tokenizer(folder)
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    body |= fields or {}
    async with running_server(state) as url, httpx.AsyncClient() as http:
        answer = await http.post(f"{url}/v1/chat/completions", json=body)
    return answer, [tokenizer.decode(prompt) for prompt in engine.prompts.values()]


@pytest.mark.parametrize(
    "template",
    [
        "{% for part in messages[0].content %}{{ part.text }}{% endfor %}",
        "{{ messages[0].content }}",
    ],
)
async def test_the_parts_of_a_message_become_one_text(tmp_path, template):
    for content in (PARTS, "onetwo"):
        answer, prompts = await chat(tmp_path, template, content)
        assert (answer.status_code, prompts) == (200, ["onetwo"])


async def test_a_template_is_told_that_there_are_no_tools_and_no_documents(tmp_path):
    template = "{% if tools is not none or documents is not none %}wrong{% else %}right{% endif %}"
    _, prompts = await chat(tmp_path, template, "Hi")
    assert prompts == ["right"]


@pytest.mark.parametrize("template", ["{{ '{} {}'.format('a') }}", "{{ messages[3].content }}"])
async def test_a_template_that_fails_is_answered_with_400_and_its_words(tmp_path, template):
    answer, prompts = await chat(tmp_path, template, "Hi")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], prompts) == (400, "messages", [])
    assert error["message"].startswith("The chat template refuses these messages: ")


async def test_a_mark_that_only_the_tokenizer_s_config_knows_is_one_token(tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}"
        "{% endfor %}<|im_start|>assistant{{ '\n' }}"
    )
    marks = {"259": {"content": "<|im_start|>"}, "260": {"content": "<|im_end|>"}}
    answer, _ = await chat(tmp_path, template, "Hi", added_tokens_decoder=marks)
    assert answer.json()["usage"]["prompt_tokens"] == 21


async def test_variables_of_a_request_come_to_the_template(tmp_path):
    template = (
        "{{ documents[0].text if documents }} {{ enable_thinking }} {{ reasoning_effort }} "
        "{{ tools[0].function.name if tools }} {{ add_generation_prompt }}"
    )
    for fields, prompt in (
        ({"documents": [{"text": "a"}], "reasoning_effort": "low"}, "a  low  True"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, " True   True"),
        ({"reasoning_effort": "none", "add_generation_prompt": False}, " False   False"),
    ):
        assert (await chat(tmp_path, template, "Hi", fields=fields))[1] == [prompt]
    tool = {"type": "function", "function": {"name": "f"}}
    flags = ["--tool-call-parser", "hermes"]
    _, prompts = await chat(tmp_path, template, "Hi", fields={"tools": [tool]}, flags=flags)
    assert prompts == ["   f True"]


async def test_templates_have_names_and_one_of_them_is_for_tools(tmp_path):
    named = [{"name": "default", "template": "default"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    flags = ["--tool-call-parser", "hermes"]
    tool = {"type": "function", "function": {"name": "f"}}
    for fields, prompt in (
        ({}, "default"),
        ({"tools": [tool]}, "tools"),
        ({"tools": [tool], "tool_choice": "none"}, "default"),
        ({"chat_template": "rag"}, "rag"),
    ):
        _, prompts = await chat(
            tmp_path, None, "Hi", fields=fields, flags=flags, chat_template=named
        )
        assert prompts == [prompt]


async def test_a_template_of_a_request_is_taken_by_a_server_that_trusts_it(tmp_path):
    fields = {"chat_template": "own {{ messages[0].content }}"}
    answer, _ = await chat(tmp_path, "{{ 1 }}", "Hi", fields=fields)
    assert "--trust-request-chat-template" in answer.json()["error"]["message"]
    flags = ["--trust-request-chat-template"]
    _, prompts = await chat(tmp_path, "{{ 1 }}", "Hi", fields=fields, flags=flags)
    assert prompts == ["own Hi"]
    fields = {"chat_template": "{% if %}"}
    answer, _ = await chat(tmp_path, "{{ 1 }}", "Hi", fields=fields, flags=flags)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template")


async def test_a_last_message_that_the_template_changes_cannot_be_continued(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " It is "}]
    fields = {"messages": messages, "continue_final_message": True}
    template = "{% for m in messages %}{{ m.content }}.{% endfor %}{{ add_generation_prompt }}"
    _, prompts = await chat(tmp_path, template, "", fields=fields)
    assert prompts == ["a. It is"]
    shouting = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    answer, _ = await chat(tmp_path, shouting, "", fields=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "continue_final_message")


async def test_a_template_that_loops_ends_and_others_are_answered_meanwhile(tmp_path):
    write_tiny_tokenizer(
        tmp_path,
        "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}"
        "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}x",
    )
    config = make_config()
    engine = FakeEngine(config.engine)
    engine.ready = msgspec.structs.replace(READY, vocab_size=300)
    state = make_state(engine, config)
    state.tokenizer = load_tokenizer(tmp_path)

    async def ask(http: httpx.AsyncClient, content: str) -> tuple[int, float]:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        answer = await http.post("/v1/chat/completions", json=body, timeout=60)
        return answer.status_code, time.monotonic()

    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        looping = asyncio.create_task(ask(http, "loop"))
        await asyncio.sleep(0.05)
        answered = [await ask(http, "Hi") for _ in range(3)]
        status, ended = await looping
    assert status == 400
    assert [status for status, _ in answered] == [200] * 3
    assert answered[-1][1] < ended
