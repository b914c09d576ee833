"""`pagoda run-batch` with an engine process on a tiny random checkpoint, killed and run again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagoda_runtime.cli import main
from pagoda_runtime.models.testing import make_tiny_checkpoint, write_tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
NUM_LINES = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    write_tiny_tokenizer(folder, TEMPLATE)
    return folder


def command(model, source, destination, *flags):
    return [
        *(sys.executable, "-m", "pagoda_runtime", "run-batch", "-i", str(source)),
        *("-o", str(destination), str(model), "--num-threads", "1", "--max-num-seqs", "4"),
        *("--kv-cache-memory-bytes", "4000000", *flags),
    ]


def write_source(path):
    """Every tenth line is broken."""
    lines = []
    for i in range(NUM_LINES):
        asked = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
        chat = {**asked, "messages": [{"role": "user", "content": f"Hello {i}"}]}
        url, body = ("chat/completions", chat) if i % 2 else ("completions", asked)
        body.setdefault("prompt", f"Text {i}") if url == "completions" else None
        line = {"custom_id": f"line-{i}", "method": "POST", "url": f"/v1/{url}", "body": body}
        lines.append("{broken" if i % 10 == 9 else json.dumps(line))
    path.write_text("\n".join(lines) + "\n")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kill_after_lines(process, destination, num_lines):
    deadline = time.monotonic() + 60
    while not destination.exists() or destination.read_bytes().count(b"\n") < num_lines:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_without_losing_or_repeating_a_line(model, tmp_path):
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_source(source)
    with subprocess.Popen(
        command(model, source, destination), stderr=subprocess.DEVNULL
    ) as process:
        kill_after_lines(process, destination, NUM_LINES // 3)
    # As if the machine had stopped within a write.
    with destination.open("ab") as file:
        file.write(b'{"id":"batch_req_1","custom')
    before = destination.read_text().splitlines()[:-1]
    assert len(before) < NUM_LINES
    last = subprocess.run(
        command(model, source, destination), capture_output=True, text=True, timeout=120
    )
    assert last.returncode == 0, last.stderr
    assert last.stdout == ""
    assert destination.read_text().splitlines()[: len(before)] == before
    results = read(destination)
    assert len(results) == NUM_LINES
    ids = [result["custom_id"] for result in results if result["custom_id"] is not None]
    assert sorted(ids) == sorted(f"line-{i}" for i in range(NUM_LINES) if i % 10 != 9)
    broken = [result["error"]["line"] for result in results if result["custom_id"] is None]
    assert sorted(broken) == list(range(10, NUM_LINES + 1, 10))
    answers = {r["custom_id"]: r["response"]["body"] for r in results if r["response"]}
    assert answers["line-4"]["usage"]["completion_tokens"] == 20
    assert answers["line-5"]["choices"][0]["message"]["content"]
    done = subprocess.run(command(model, source, destination), capture_output=True, text=True)
    assert "0 answers and 0 errors" in done.stderr
    assert read(destination) == results


@pytest.mark.slow
def test_sigterm_stops_a_run_that_the_same_command_continues(model, tmp_path):
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_source(source)
    with subprocess.Popen(
        command(model, source, destination), stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not destination.exists() or not destination.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, shown = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command continues" in shown
    assert "Traceback" not in shown
    assert 0 < len(read(destination)) < NUM_LINES


@pytest.mark.slow
def test_an_engine_that_cannot_start_is_one_message(model, tmp_path):
    source = tmp_path / "in.jsonl"
    write_source(source)
    small = command(model, source, tmp_path / "out.jsonl", "--kv-cache-memory-bytes", "100")
    result = subprocess.run(small, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Raise --kv-cache-memory-bytes" in result.stderr
    assert "Traceback" not in result.stderr


def test_two_models_are_one_too_many(model, tmp_path, capsys):
    flags = command(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", "other")
    assert main(flags[3:]) == 2
    assert "give one of them" in capsys.readouterr().err
