"""`pagoda chat`: in a pipe and in a terminal, against our server and against scripted ones."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pagoda_runtime.cli import main
from pagoda_runtime.server.testing import FakeEngine, make_config, make_state, running_server

# In place of the rest of a stream.
CUT: dict[str, Any] = {"cut": True}


class Scripted(ThreadingHTTPServer):
    """Answers each chat with the next list of deltas, and keeps the bodies that it got."""

    daemon_threads = True

    def __init__(self, *answers: list[dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = list(answers)
        self.bodies: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.pause = threading.Event()
        self.pause.set()


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self.answer(json.dumps({"data": [{"id": "scripted"}]}))

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        self.server.bodies.append(json.loads(self.rfile.read(length)))
        self.send_response(200)
        self.end_headers()
        for delta in self.server.answers.pop(0):
            if delta == CUT:
                return
            chunk = delta if "error" in delta else {"choices": [{"index": 0, "delta": delta}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.flush()
            self.server.pause.wait(10)
        self.wfile.write(b"data: [DONE]\n\n")

    def answer(self, body: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[Any]:
    servers = []

    def start(*answers: list[dict[str, Any]]) -> Scripted:
        servers.append(Scripted(*answers))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.pause.set()
        server.shutdown()
        server.server_close()


def call(index: int, arguments: str, **function: str) -> dict[str, Any]:
    part = {"index": index, "function": {"arguments": arguments, **function}}
    return {"tool_calls": [{**part, "id": f"call_{index}"} if function else part]}


def pipe(monkeypatch: pytest.MonkeyPatch, question: str, *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(question))
    return main(["chat", *flags])


async def test_a_question_in_a_pipe_gets_its_answer_and_nothing_else(monkeypatch, capsys):
    config = make_config("--api-key", "k")
    engine = FakeEngine(config.engine)
    async with running_server(make_state(engine, config)) as url:
        flags = ["--url", url, "--api-key", "k", "--system", "s"]
        assert await asyncio.to_thread(pipe, monkeypatch, "hi\n", *flags) == 0
        assert await asyncio.to_thread(pipe, monkeypatch, "hi", "--url", url) == 1
    out, err = capsys.readouterr()
    assert out.startswith("héllo héllo ")
    assert "tokens/s" in err
    assert "401" in err
    assert "--api-key" in err
    (prompt,) = engine.prompts.values()
    assert bytes(prompt).decode() == "\nsystem: s\nuser: hi\nassistant:"


def test_reasoning_and_calls_are_printed(monkeypatch, capsys, scripted, tmp_path):
    deltas = [{"reasoning_content": "hm"}, {"content": "Let me see."}]
    deltas += [call(0, "", name="look"), call(0, '{"a": '), call(0, "1}")]
    server = scripted(deltas)
    tools = tmp_path / "tools.json"
    tools.write_text('[{"type": "function", "function": {"name": "look"}}]')
    assert pipe(monkeypatch, "q", "--url", server.url, "--tools", str(tools)) == 0
    out, err = capsys.readouterr()
    assert out == 'Let me see.\nlook({"a": 1})\n'
    assert "hm" in err
    assert server.bodies[0]["tools"][0]["function"]["name"] == "look"
    assert server.bodies[0]["model"] == "scripted"


@pytest.mark.parametrize(
    ("deltas", "words"),
    [
        ([{"content": "a"}, {"error": {"message": "gone"}}], "breaks off: gone"),
        ([{"content": 3}], "no chunk"),
        ([{"content": "a"}, CUT], "without [DONE]"),
    ],
)
def test_a_stream_that_breaks_off_is_an_error(monkeypatch, capsys, scripted, deltas, words):
    assert pipe(monkeypatch, "q", "--url", scripted(deltas).url) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[", None])
def test_a_file_that_holds_no_tools_is_named(monkeypatch, capsys, tmp_path, text):
    path = tmp_path / "tools.json"
    if text is not None:
        path.write_text(text)
    assert pipe(monkeypatch, "q", "--tools", str(path)) == 1
    assert str(path) in capsys.readouterr().err


def be_a_session() -> None:
    """So that Ctrl-C is for it alone, and heard: what a shell has in its background ignores it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """`pagoda chat` in a terminal of its own."""

    def __init__(self, *flags: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "pagoda_runtime", "chat", *flags]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=be_a_session,
            env={**os.environ, "TERM": "xterm"},
        )
        self.slave = slave
        self.text = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                self.text += os.read(self.master, 65536).decode(errors="replace")
            except OSError:
                return

    def wait_for(self, words: str, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)
        self.text = self.text.partition(words)[2]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.slave)
        os.close(self.master)


def test_a_terminal_keeps_history_sends_results_and_stops_answers(scripted):
    server = scripted(
        [{"content": "one\x1b[2J"}],
        [call(0, "{}", name="look")],
        [{"content": "two"}],
        [{"content": "three"}, {"content": "never"}],
        [{"content": "four"}],
    )
    terminal = Terminal("--url", server.url)
    try:
        terminal.wait_for("> ")
        terminal.type("first\n")
        terminal.wait_for("one[2J")
        terminal.wait_for("> ")
        terminal.type("second\n")
        terminal.wait_for("look({})")
        terminal.wait_for("result of look: ")
        terminal.type("seen\n")
        terminal.wait_for("two")
        terminal.wait_for("> ")
        server.pause.clear()
        terminal.type("third\n")
        terminal.wait_for("three")
        os.killpg(terminal.process.pid, 2)
        terminal.wait_for("stopped")
        server.pause.set()
        terminal.wait_for("> ")
        terminal.type("/clear\n")
        terminal.wait_for("> ")
        terminal.type("fourth\n")
        terminal.wait_for("four")
        terminal.type("\x04")
        assert terminal.process.wait(10) == 0
    finally:
        terminal.close()
    histories = [[m["content"] for m in body["messages"]] for body in server.bodies]
    assert histories[1] == ["first", "one\x1b[2J", "second"]
    assert histories[2] == [*histories[1], "", "seen"]
    assert server.bodies[2]["messages"][-1]["tool_call_id"] == "call_0"
    assert histories[3] == [*histories[2], "two", "third"]
    assert histories[4] == ["fourth"]
