"""The OpenAI routes through the `openai` client, on a real HTTP server with a fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import msgspec
import openai
import pytest
import pytest_asyncio

from pagoda_runtime.server.state import ServerState
from pagoda_runtime.server.testing import READY, FakeEngine, make_config, make_state, running_server


@pytest.fixture
def state(engine: FakeEngine) -> ServerState:
    return make_state(engine, make_config("--served-model-name", "tiny", "alias"))


@pytest_asyncio.fixture
async def url(state: ServerState) -> AsyncIterator[str]:
    async with running_server(state) as url:
        yield url


@pytest_asyncio.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


async def drain(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


async def test_a_completion_has_text_reason_and_usage(client):
    answer = await client.completions.create(model="tiny", prompt="abc", max_tokens=8)
    choice, usage = answer.choices[0], answer.usage
    assert (choice.text, choice.finish_reason) == ("héllo h", "length")
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 8, 11)
    assert usage.prompt_tokens_details.cached_tokens == 4


async def test_a_completion_has_16_tokens_by_default(client):
    answer = await client.completions.create(model="tiny", prompt="abc")
    assert answer.usage.completion_tokens == 16


async def test_a_default_number_of_tokens_never_exceeds_the_context(client):
    answer = await client.completions.create(model="tiny", prompt="a" * 120)
    assert answer.usage.completion_tokens == 8


async def test_several_prompts_are_several_choices(client, engine):
    prompts = ["a", "bb", "ccc"]
    answer = await client.completions.create(model="tiny", prompt=prompts, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == 6
    assert list(engine.prompts.values()) == [list(prompt.encode()) for prompt in prompts]


@pytest.mark.parametrize("prompt", [[97, 98], [[97, 98]]])
async def test_a_prompt_may_be_token_ids(client, engine, prompt):
    await client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert list(engine.prompts.values()) == [[97, 98]]


async def test_several_prompts_stream_as_several_choices(client):
    stream = await client.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=7, stream=True
    )
    texts = {0: "", 1: ""}
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "héllo ", 1: "héllo "}


async def test_a_streamed_completion_ends_with_reason_and_usage(client):
    stream = await client.completions.create(
        model="tiny",
        prompt="abc",
        max_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "héllo "
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 7


async def test_continuous_usage_grows_with_every_chunk(client):
    stream = await client.completions.create(
        model="tiny",
        prompt="abc",
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream]
    assert counts == [1, 2, 3, 3]


async def test_continuous_usage_of_a_chat_begins_with_the_prompt_s(client):
    stream = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=2,
        n=2,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    usages = [chunk.usage async for chunk in stream]
    num_prompt_tokens = len("\nuser: Hi\nassistant:")
    assert [usage.prompt_tokens for usage in usages] == [num_prompt_tokens] * len(usages)
    assert [usage.completion_tokens for usage in usages[:2]] == [0, 0]
    assert usages[0].total_tokens == num_prompt_tokens
    assert usages[-1].completion_tokens == 4


async def test_a_chat_sees_the_rendered_messages(client, engine):
    answer = await client.chat.completions.create(
        model="alias",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ],
        max_completion_tokens=6,
    )
    assert answer.choices[0].message.content == "héllo"
    assert answer.choices[0].message.role == "assistant"
    assert answer.model == "alias"
    (prompt,) = engine.prompts.values()
    assert bytes(prompt).decode() == "\nsystem: Be brief.\nuser: Hi\nassistant:"


async def test_the_model_s_own_bound_holds_where_a_request_names_none(client, engine):
    engine.ready = msgspec.structs.replace(READY, default_sampling={"max_tokens": 20})
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    answers = [
        await client.chat.completions.create(**asked),
        await client.completions.create(model="tiny", prompt="abc"),
        await client.chat.completions.create(**asked, max_completion_tokens=22),
        await client.completions.create(model="tiny", prompt="a" * 120),
    ]
    assert [answer.usage.completion_tokens for answer in answers] == [20, 20, 22, 8]


async def test_a_chat_without_a_bound_uses_the_rest_of_the_context(client, engine):
    answer = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}]
    )
    assert answer.usage.total_tokens == READY.max_model_len


async def test_a_streamed_chat_begins_with_the_role(client):
    stream = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=7, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "héllo "
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_before_it_and_the_request_in_the_engine(
    client, engine, stream
):
    answer = await client.completions.create(
        model="tiny", prompt="abc", max_tokens=100, stop=["lo h"], stream=stream
    )
    if stream:
        chunks = [chunk async for chunk in answer]
        text, last = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0]
    else:
        text, last = answer.choices[0].text, answer.choices[0]
    assert (text, last.finish_reason, last.stop_reason) == ("hél", "stop", "lo h")
    assert not engine.running


async def test_a_stop_token_is_the_stop_reason(client):
    answer = await client.completions.create(
        model="tiny", prompt="abc", max_tokens=100, extra_body={"stop_token_ids": [ord("o")]}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == ord("o")


async def test_models_are_listed_by_their_served_names(client):
    models = (await client.models.list()).data
    assert [model.id for model in models] == ["tiny", "alias"]
    assert models[0].max_model_len == READY.max_model_len
    assert (models[0].root, models[0].parent) == ("fake", None)
    assert (await client.models.retrieve("alias")).id == "alias"


async def test_a_neutral_value_of_an_unsupported_field_is_accepted(client):
    await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=1,
        n=1,
        logprobs=False,
        presence_penalty=0,
        frequency_penalty=0.0,
        response_format={"type": "text"},
        tools=[],
        user="me",
        extra_body={"echo": False, "return_token_ids": False},
    )


async def test_an_unknown_field_is_accepted_and_reported_once(url, caplog):
    async with httpx.AsyncClient() as http:
        for _ in range(2):
            body = {"prompt": "a", "max_tokens": 1, "frobnicate": 3}
            answer = await http.post(f"{url}/v1/completions", json=body)
            assert answer.status_code == 200
    assert [record.message for record in caplog.records if "frobnicate" in record.message] == [
        "Unknown field in a request, ignored: 'frobnicate'"
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_prompts", [1, 3])
async def test_a_client_that_leaves_frees_its_requests_at_once(client, engine, stream, num_prompts):
    engine.step_seconds = 0.01
    prompts = ["abc"] * num_prompts

    async def ask() -> None:
        answer = await client.completions.create(
            model="tiny", prompt=prompts, max_tokens=100, stream=stream
        )
        if stream:
            await drain(answer)

    asking = asyncio.create_task(ask())
    async with asyncio.timeout(2):
        while len(engine.running) < num_prompts:
            await asyncio.sleep(0.001)
        asking.cancel()
        while engine.running:
            await asyncio.sleep(0.001)


async def test_an_engine_that_dies_ends_a_stream_with_an_error(client, engine, state):
    engine.step_seconds = 0.005
    stream = await client.completions.create(model="tiny", prompt="a", max_tokens=99, stream=True)
    await engine.shutdown()
    with pytest.raises(openai.APIError, match="shut down"):
        await drain(stream)
    async with asyncio.timeout(2):
        while state.num_requests:
            await asyncio.sleep(0.001)
