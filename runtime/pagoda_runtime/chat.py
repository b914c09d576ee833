"""`pagoda chat`: a conversation with any OpenAI-compatible server, in a terminal or a pipe."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import msgspec

from pagoda_runtime.bench.chunks import Chunk, ChunkReader, Delta, ErrorEvent, show_error
from pagoda_runtime.bench.client import HttpClient
from pagoda_runtime.bench.server import add_server_flags, find_model, make_client
from pagoda_runtime.errors import PagodaError, RequestError, exit_status

Message = dict[str, Any]

PATH = "/v1/chat/completions"
HELP = "Enter sends, Ctrl-C stops an answer, Ctrl-D ends. /clear forgets the conversation."
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# What a model writes must not steer the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pagoda chat`."""
    add_server_flags(parser.add_argument_group("server"))
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    group.add_argument(
        "--tools",
        metavar="FILE",
        type=Path,
        help="JSON list of tools as OpenAI's API takes them; you are asked for a call's result",
    )


def run(args: argparse.Namespace) -> int:
    """Talk as the flags say; the exit status. One question comes from a pipe."""
    try:
        chat = Chat(
            make_client(args),
            Screen(sys.stdout, sys.stderr),
            tools=_read_tools(args.tools),
            messages=[{"role": "system", "content": args.system}] if args.system else [],
        )
        with asyncio.Runner() as runner, contextlib.ExitStack() as stack:
            stack.callback(lambda: runner.run(chat.client.close()))
            chat.model = runner.run(find_model(chat.client, args))
            if sys.stdin.isatty():
                _converse(chat, runner)
            else:
                chat.messages.append({"role": "user", "content": sys.stdin.read().strip()})
                runner.run(chat.answer())
    except PagodaError as error:
        print(f"pagoda chat: {error}", file=sys.stderr)
        return exit_status(error)
    except KeyboardInterrupt:
        return 130
    return 0


def _read_tools(path: Path | None) -> list[Any]:
    if path is None:
        return []
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"--tools {path} cannot be read as JSON: {error}.") from error
    if not isinstance(tools, list):
        raise RequestError(f"--tools {path} holds no JSON list; write [{{...}}] around one tool.")
    return tools


@dataclass(slots=True)
class Screen:
    """Where an answer goes, and what is told beside it: dim, on standard error."""

    out: TextIO
    err: TextIO

    def write(self, text: str) -> None:
        self.out.write(_CONTROL.sub("", text) if self.out.isatty() else text)
        self.out.flush()

    def note(self, text: str) -> None:
        if self.err.isatty():
            text = f"{DIM}{_CONTROL.sub('', text)}{PLAIN}"
        self.err.write(text)
        self.err.flush()


@dataclass(slots=True)
class Chat:
    """One conversation; its messages are sent whole with each question."""

    client: HttpClient
    screen: Screen
    model: str = ""
    tools: list[Any] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    async def answer(self) -> Message:
        """Ask for the next message, show it as it comes, and keep it, or what came of it."""
        message: Message = {"role": "assistant", "content": ""}
        started, first, num_tokens = time.perf_counter(), 0.0, 0
        try:
            async for chunk in self._chunks():
                if chunk.usage is not None:
                    num_tokens = chunk.usage.completion_tokens or 0
                for choice in chunk.choices:
                    first = first or time.perf_counter()
                    self._show(choice.delta or Delta(), message)
        except asyncio.CancelledError:
            # A call that is cut off has no result.
            message.pop("tool_calls", None)
            raise
        finally:
            if message["content"] or "tool_calls" in message:
                self.messages.append(message)
                self.screen.write("\n")
        for call in message.get("tool_calls", ()):
            function = call["function"]
            self.screen.write(f"{function['name']}({function['arguments']})\n")
        seconds = time.perf_counter() - first
        if num_tokens > 1 and seconds > 0:
            self.screen.note(
                f"first token after {first - started:.2f} s, {num_tokens} tokens, "
                f"{(num_tokens - 1) / seconds:.1f} tokens/s\n"
            )
        return message

    def _show(self, delta: Delta, message: Message) -> None:
        self.screen.note(delta.thoughts)
        text = delta.content or ""
        message["content"] += text
        self.screen.write(text)
        for call in delta.tool_calls or ():
            calls = message.setdefault("tool_calls", [])
            if call.index == len(calls):
                empty = {"name": "", "arguments": ""}
                calls.append({"id": call.id, "type": "function", "function": empty})
            function = calls[call.index]["function"]
            if call.function is not None:
                function["name"] += call.function.name or ""
                function["arguments"] += call.function.arguments or ""

    async def _chunks(self) -> AsyncIterator[Chunk]:
        """Raises RequestError: the server refuses, or breaks off; NoAnswer."""
        body = {
            "model": self.model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"tools": self.tools} if self.tools else {}),
        }
        chunks = ChunkReader()
        async with self.client.request("POST", PATH, msgspec.json.encode(body)) as answer:
            if answer.status != 200:
                reason = show_error(await answer.read_all())
                raise RequestError(f"The server answers {answer.status}: {reason}")
            try:
                async for piece in answer.pieces():
                    for chunk in chunks.feed(piece):
                        yield chunk
            except ErrorEvent as error:
                raise RequestError(f"The server breaks off: {error}") from error
            chunks.finish()


def _converse(chat: Chat, runner: asyncio.Runner) -> None:
    """Questions from a terminal, until its end of file."""
    with contextlib.suppress(ImportError):
        # Importing it gives `input` a history and keys to edit with.
        importlib.import_module("readline")
    chat.screen.note(f"{chat.model}. {HELP}\n")
    num_kept = len(chat.messages)
    while (question := _ask("> ")) is not None:
        if question == "/clear":
            del chat.messages[num_kept:]
        elif question:
            num_before = len(chat.messages)
            chat.messages.append({"role": "user", "content": question})
            try:
                _answer_with_tools(chat, runner, _ask)
            except KeyboardInterrupt:
                chat.screen.note("\nstopped\n")
            except PagodaError as error:
                chat.screen.note(f"{error}\n")
            if chat.messages[-1]["role"] != "assistant" or "tool_calls" in chat.messages[-1]:
                # With no answer behind it, it would be in the way of the next question.
                del chat.messages[num_before:]


def _answer_with_tools(
    chat: Chat, runner: asyncio.Runner, ask: Callable[[str], str | None]
) -> None:
    """One answer; while it calls tools, their results are asked for and sent."""
    while calls := runner.run(chat.answer()).get("tool_calls"):
        for call in calls:
            result = ask(f"result of {call['function']['name']}: ") or ""
            message = {"role": "tool", "tool_call_id": call["id"], "content": result}
            chat.messages.append(message)


def _ask(prompt: str) -> str | None:
    """A line of the user's; None at the end of the file."""
    try:
        return input(prompt).strip()
    except EOFError:
        print()
        return None
