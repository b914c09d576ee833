"""What in a chat cannot be: tools, ids, roles and endings that contradict each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pagoda_runtime.errors import RequestError, shown
from pagoda_runtime.server.chat_protocol import ChatCompletionRequest, NamedTool


def verify_chat(request: ChatCompletionRequest) -> None:
    """Raise RequestError, with the path, for what contradicts itself in a chat."""
    _verify_tools(request)
    names = {tool.function.name for tool in request.tools or ()}
    for path, call in request.calls():
        if names and call.function.name not in names:
            _refuse(f"{path}.function.name", shown(call.function.name), "it is none of the tools")
        if not _is_object(call.function.arguments or "{}"):
            path += ".function.arguments"
            _refuse(path, shown(call.function.arguments), "it must be a JSON object as text")
    open_ids: set[str] = set()
    for number, message in enumerate(request.messages):
        path = f"messages[{number}]"
        if message.tool_calls and message.role != "assistant":
            _refuse(f"{path}.tool_calls", "there", f"a message of the role {message.role} has none")
        if message.role == "tool":
            if message.tool_call_id not in open_ids:
                what = shown(message.tool_call_id)
                _refuse(f"{path}.tool_call_id", what, "it is the id of no call before it")
        elif message.tool_call_id is not None:
            _refuse(f"{path}.tool_call_id", "there", "only messages of the role tool have one")
        # An empty text is one; an empty list of parts holds none.
        is_missing = message.content is None or message.content == []
        if is_missing and not message.tool_calls and not message.thoughts:
            why = f"a message of the role {message.role} needs a text, which may be empty"
            _refuse(f"{path}.content", "missing", why)
        open_ids.update(call.id for call in message.tool_calls or ())
    _verify_ending(request)


def _refuse(path: str, what: str, why: str) -> None:
    raise RequestError(f"{path} is {what}; {why}.", param=path)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _verify_tools(request: ChatCompletionRequest) -> None:
    names: set[str] = set()
    for number, tool in enumerate(request.tools or ()):
        path, function = f"tools[{number}].function", tool.function
        if function.name in names:
            _refuse(f"{path}.name", shown(function.name), "another tool has this name")
        names.add(function.name)
        _verify_parameters(f"{path}.parameters", function.parameters or {})
    if request.must_call and not request.forced_tools:
        path, what = "tool_choice", shown(request.tool_choice)
        if names:
            path, what = "tool_choice.function.name", shown(_chosen_name(request))
        _refuse(path, what, f"it must name one of the tools: {', '.join(sorted(names)) or 'none'}")


def _chosen_name(request: ChatCompletionRequest) -> str | None:
    choice = request.tool_choice
    return choice.function.name if isinstance(choice, NamedTool) else choice


def _verify_parameters(path: str, schema: Mapping[str, Any]) -> None:
    """As far as templates and formats look into a schema."""
    if schema.get("type", "object") != "object":
        _refuse(f"{path}.type", shown(schema["type"]), "arguments are an object")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict):
        _refuse(f"{path}.properties", shown(properties), "it must be an object of schemas")
    for name, part in properties.items():
        if not isinstance(part, (dict, bool)):
            _refuse(f"{path}.properties.{name[:80]}", shown(part), "it must be a schema")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        _refuse(f"{path}.required", shown(required), "it must be a list of names")


def _verify_ending(request: ChatCompletionRequest) -> None:
    param = "continue_final_message"
    if not request.continue_final_message:
        return
    if request.add_generation_prompt:
        raise RequestError(
            f"{param} and add_generation_prompt ask for two beginnings; leave one out.", param=param
        )
    if request.messages[-1].role != "assistant" or not request.messages[-1].text.strip():
        raise RequestError(
            f"{param} asks for a last message of the role assistant with words.", param=param
        )
