"""Chat templates of checkpoints behind the real HTTP server, with a real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import msgspec
import pytest

from pagoda_runtime.models.testing import write_tiny_tokenizer
from pagoda_runtime.server.testing import READY, FakeEngine, make_config, make_state, running_server
from pagoda_runtime.tokenizer.tokenizer import load_tokenizer

PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


async def chat(
    folder: Path, template: str, content: object, **settings: object
) -> tuple[httpx.Response, list[str]]:
    """The answer, and the prompts that came to the engine."""
    write_tiny_tokenizer(folder, template)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    config = make_config()
    engine = FakeEngine(config.engine)
    engine.ready = msgspec.structs.replace(READY, vocab_size=300)
    state = make_state(engine, config)
    state.tokenizer = tokenizer = load_tokenizer(folder)
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
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
