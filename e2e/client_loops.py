"""Each client calls a tool, sends its result, asks for a schema, streams and embeds.

python client_loops.py CHAT_URL EMBEDDINGS_URL, in an environment with the clients and nothing of
Pagoda; `clients.py` starts it. A line of JSON for each: its name with the version, and what it did.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

QUESTION = "7 + 5?"
MOST = 1500


class Sum(BaseModel):
    """Two numbers and what is done with them."""

    # Else a schema lets any other field in, and a random model writes them until it is cut off.
    model_config = ConfigDict(extra="forbid")

    a: int = Field(ge=0, le=99)
    b: int = Field(ge=0, le=99)
    sign: Literal["+", "-"]


def result_of(given: Sum) -> str:
    return str(given.a + given.b if given.sign == "+" else given.a - given.b)


def langchain(model: Any, embeddings: Any) -> list[str]:
    """A LangChain model: bind_tools, with_structured_output, stream."""
    from langchain_core.messages import HumanMessage, ToolMessage

    calling = model.bind_tools([Sum], tool_choice="Sum")
    first = calling.invoke([HumanMessage(QUESTION)])
    call = first.tool_calls[0]
    result = ToolMessage(result_of(Sum.model_validate(call["args"])), tool_call_id=call["id"])
    assert model.bind_tools([Sum]).invoke([HumanMessage(QUESTION), first, result])
    found = model.with_structured_output(Sum).invoke(QUESTION)
    assert isinstance(found, Sum)
    assert len([*model.stream(QUESTION)]) > 2
    if embeddings is None:
        return ["yes", "yes", "yes", ""]
    assert len(embeddings.embed_documents(["a", "b"])) == 2
    return ["yes"] * 4


def langchain_openai(chat: str, embedder: str, **options: Any) -> list[str]:
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    model = ChatOpenAI(
        base_url=f"{chat}/v1", api_key="any", model="tiny", max_tokens=MOST, **options
    )
    embeddings = OpenAIEmbeddings(
        base_url=f"{embedder}/v1", api_key="any", model="tiny", check_embedding_ctx_length=False
    )
    return langchain(model, embeddings)


def langchain_responses(chat: str, embedder: str) -> list[str]:
    return langchain_openai(chat, embedder, use_responses_api=True)


def langchain_anthropic(chat: str, embedder: str) -> list[str]:
    from langchain_anthropic import ChatAnthropic

    model = ChatAnthropic(base_url=chat, api_key="any", model="tiny", max_tokens=MOST)
    return langchain(model, None)


def litellm(chat: str, embedder: str) -> list[str]:
    import litellm as client

    fields: dict[str, Any] = {"model": "openai/tiny", "api_key": "any", "max_tokens": MOST}
    fields["api_base"] = f"{chat}/v1"
    schema = Sum.model_json_schema()
    tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    first = client.completion(messages=messages, tools=[tool], tool_choice="required", **fields)
    message = first.choices[0].message
    call = message.tool_calls[0]
    text = result_of(Sum.model_validate_json(call.function.arguments))
    messages += [message] + [
        {"role": "tool", "tool_call_id": call.id, "content": text} for call in message.tool_calls
    ]
    assert client.completion(messages=messages, tools=[tool], **fields).choices
    found = client.completion(messages=messages[:1], response_format=Sum, **fields)
    assert Sum.model_validate_json(found.choices[0].message.content)
    assert len([*client.completion(messages=messages[:1], stream=True, **fields)]) > 2
    given = {"model": "openai/tiny", "api_base": f"{embedder}/v1", "api_key": "any"}
    assert len(client.embedding(input=["a", "b"], **given).data) == 2
    return ["yes"] * 4


def instructor(chat: str, embedder: str) -> list[str]:
    import instructor as client
    import openai

    inner = openai.OpenAI(base_url=f"{chat}/v1", api_key="any")
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": MOST, "messages": messages}
    for mode in (client.Mode.TOOLS, client.Mode.JSON_SCHEMA):
        wrapped = client.from_openai(inner, mode=mode)
        found = wrapped.chat.completions.create(response_model=Sum, max_retries=0, **fields)
        assert isinstance(found, Sum)
    wrapped = client.from_openai(inner, mode=client.Mode.TOOLS)
    parts = [*wrapped.chat.completions.create_partial(response_model=Sum, **fields)]
    assert Sum.model_validate(parts[-1].model_dump())
    return ["yes", "yes", "yes", ""]


def pydantic_ai(chat: str, embedder: str) -> list[str]:
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{chat}/v1", api_key="any")
    model = OpenAIChatModel("tiny", provider=provider, settings={"max_tokens": MOST})
    agent = Agent(model, output_type=Sum)
    calls: list[Sum] = []

    @agent.tool_plain
    def add(given: Sum) -> str:
        calls.append(given)
        return result_of(given)

    # Each turn must call: the tool, or the one that ends the run with a Sum.
    for _ in range(20):
        assert isinstance(agent.run_sync(QUESTION).output, Sum)
        if calls:
            break
    assert calls, "in 20 runs the tool was never called"
    assert isinstance(Agent(model, output_type=NativeOutput(Sum)).run_sync(QUESTION).output, Sum)
    with Agent(model).run_stream_sync(QUESTION) as stream:
        assert len([*stream.stream_text(delta=True, debounce_by=None)]) > 1
    return ["yes", "yes", "yes", ""]


CLIENTS: dict[str, Callable[[str, str], list[str]]] = {
    "langchain-openai": langchain_openai,
    "langchain-openai by responses": langchain_responses,
    "langchain-anthropic": langchain_anthropic,
    "litellm": litellm,
    "instructor": instructor,
    "pydantic-ai-slim": pydantic_ai,
}


def main(chat: str, embedder: str) -> int:
    status = 0
    for name, run in CLIENTS.items():
        package, _, by = name.partition(" ")
        shown = " ".join([package, version(package), by]).strip()
        try:
            print(json.dumps([shown, *run(chat, embedder)]), flush=True)
        except Exception:
            status = 1
            traceback.print_exc()
            print(json.dumps([shown, "FAILED"]), flush=True)
    return status


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
