"""Fields that ask for something which the server does not do, and those that ask for nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from pagoda_runtime.server.testing import FakeEngine, make_config, make_state, running_server


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    state = make_state(FakeEngine(make_config().engine), make_config())
    async with running_server(state) as url, httpx.AsyncClient(base_url=url) as http:
        yield http


async def complete(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **fields})


async def chat(http: httpx.AsyncClient, *messages: Any, **fields: Any) -> httpx.Response:
    body = {"messages": messages, "max_tokens": 1, **fields}
    return await http.post("/v1/chat/completions", json=body)


def assert_refused(answer: httpx.Response, *names: str) -> None:
    """That the answer names these fields and no other."""
    *first, last = names
    them = f"{', '.join(first)} and {last} are" if first else f"{last} is"
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(f"{them} not supported here; leave ")
    assert error["param"] == names[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_logprobs", 2),
        ("tools", [{"type": "function"}]),
        ("return_token_ids", True),
        ("truncation_side", "right"),
        ("add_generation_prompt", False),
    ],
)
async def test_a_field_that_is_not_served_is_refused_by_name(http, field, value):
    assert_refused(await complete(http, **{field: value}), field)


async def test_all_fields_that_are_not_served_are_named_in_one_answer(http):
    fields: dict[str, Any] = {
        **dict.fromkeys(["grammar", "regex", "ebnf", "lora_path", "structural_tag"], "a"),
        **{name: ["a"] for name in ("logits_processors", "images", "prompt_embeds")},
        **{"truncation_side": "right", "format": "json", "json_schema": {"type": "object"}},
    }
    assert_refused(await complete(http, **fields), *fields)
    message = {"role": "user", "content": "a", "prefix": "a", "images": ["b"]}
    in_message = ["messages[0].prefix", "messages[0].images"]
    assert_refused(await chat(http, message, **fields), *fields, *in_message)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
async def test_a_field_that_is_empty_asks_for_nothing(http, value):
    names = ["logits_processors", "prompt_embeds", "truncation_side", "format", "images"]
    fields = dict.fromkeys(names, value)
    assert (await complete(http, **fields)).status_code == 200
    message = {"role": "user", "content": "a", "prefix": value}
    assert (await chat(http, message, **fields)).status_code == 200


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}])
async def test_a_message_without_content_is_named(http, role, content):
    answer = await chat(http, {"role": "user", "content": ""}, {"role": role, **content})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[1].content"
    assert f"messages[1].content is missing; a message of the role {role}" in answer.text
    assert (await chat(http, {"role": "user", "content": ""})).status_code == 200
