"""Lines through the server's routes, with a fake engine behind them."""

from __future__ import annotations

import asyncio
import json

import pytest

from pagoda_runtime.batch.job import Progress, answer_all, run_batch
from pagoda_runtime.batch.lines import pending, read_lines
from pagoda_runtime.batch.results import ResultFile
from pagoda_runtime.config import ServerConfig
from pagoda_runtime.errors import EngineDead, FatalError
from pagoda_runtime.ipc.messages import EngineFailed
from pagoda_runtime.server.openai import BODIES
from pagoda_runtime.server.testing import FakeEngine, make_config, make_state

URLS = tuple(BODIES)


def request_line(custom_id, url="/v1/completions", **body):
    if url.endswith("chat/completions"):
        body.setdefault("messages", [{"role": "user", "content": "Hi"}])
    else:
        body.setdefault("prompt", "Hi")
    line = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    return json.dumps(line) + "\n"


class Batch:
    """The files of a batch, and a server over a fake engine."""

    def __init__(self, folder, *flags, **engine):
        self.source, self.destination = folder / "in.jsonl", folder / "out.jsonl"
        config = make_config(*flags)
        self.engine = FakeEngine(config.engine, **engine)
        self.state = make_state(self.engine, config)
        self.progress = Progress()

    async def run(self, num_at_once=4):
        results = ResultFile(self.destination)
        try:
            with self.source.open("rb") as file:
                lines = read_lines(file, URLS, 10_000)
                left = pending(lines, results.custom_ids, results.line_numbers)
                await answer_all(self.state, left, results, self.progress, num_at_once)
        finally:
            results.close()

    def results(self):
        return [json.loads(line) for line in self.destination.read_text().splitlines()]


async def test_good_lines_are_answered_and_bad_ones_reported(tmp_path):
    batch = Batch(tmp_path)
    batch.source.write_text(
        request_line("text", max_tokens=3)
        + "{broken\n"
        + request_line("chat", URLS[1], max_tokens=3)
        + request_line("warm", temperature=9)
        + request_line("text", max_tokens=3)
        + request_line("nowhere", "/v1/nowhere")
        + request_line("other", model="other")
    )
    await batch.run()
    assert (batch.progress.num_answers, batch.progress.num_errors) == (2, 5)
    results = {result["id"]: result for result in batch.results()}
    assert len(results) == 7
    assert results["batch_req_1"]["response"]["body"]["choices"][0]["text"] == "hé"
    chat = results["batch_req_3"]["response"]["body"]
    assert chat["choices"][0]["message"]["content"] == "hé"
    errors = {key: result["error"] for key, result in results.items() if result["error"]}
    assert {key: error["code"] for key, error in errors.items()} == {
        "batch_req_2": "invalid_json",
        "batch_req_4": "invalid_request",
        "batch_req_5": "duplicate_custom_id",
        "batch_req_6": "invalid_line",
        "batch_req_7": "model_not_found",
    }
    assert errors["batch_req_4"]["message"].startswith("Line 4: temperature")
    assert results["batch_req_6"]["custom_id"] == "nowhere"


async def test_a_second_run_does_nothing(tmp_path):
    batch = Batch(tmp_path)
    batch.source.write_text(request_line("a") + "{\n" + request_line("a"))
    await batch.run()
    before = batch.destination.read_bytes()
    await batch.run()
    assert batch.destination.read_bytes() == before
    assert len(batch.engine.prompts) == 1


async def test_no_more_lines_are_at_work_than_was_asked_for(tmp_path):
    batch = Batch(tmp_path)
    batch.source.write_text("".join(request_line(str(i)) for i in range(20)))
    generate, nums_open = batch.engine.generate, []

    def watched(request):
        nums_open.append(batch.state.num_requests)
        return generate(request)

    batch.engine.generate = watched
    await batch.run(num_at_once=3)
    assert len(batch.results()) == 20
    assert max(nums_open) == 3


async def test_a_full_queue_is_waited_for(tmp_path):
    batch = Batch(tmp_path, "--max-num-seqs", "1", "--max-num-waiting", "1")
    batch.source.write_text("".join(request_line(str(i), prompt=["x", "y"]) for i in range(4)))
    await batch.run(num_at_once=2)
    assert [result["error"] for result in batch.results()] == [None] * 4


async def test_a_dead_engine_ends_the_run_and_leaves_its_lines_to_the_next(tmp_path):
    batch = Batch(tmp_path, step_seconds=0.01)
    batch.source.write_text("".join(request_line(str(i), max_tokens=50) for i in range(9)))
    run = asyncio.create_task(batch.run(num_at_once=3))
    while len(batch.engine.running) < 3:
        await asyncio.sleep(0.001)
    batch.engine.failure = EngineFailed(reason="OutOfMemory", message="No memory is left.")
    with pytest.raises(EngineDead, match="No memory is left"):
        await run
    assert batch.results() == []


async def test_a_crash_of_a_route_is_an_error_of_its_line(tmp_path, caplog):
    batch = Batch(tmp_path)
    batch.source.write_text(request_line("a"))
    batch.engine.generate = None
    await batch.run()
    (result,) = batch.results()
    assert result["response"]["status_code"] == 500
    assert result["error"]["code"] == "server_error"
    assert "A request failed" in caplog.text


async def test_files_are_checked_before_an_engine_is_started(tmp_path):
    config = ServerConfig(engine=make_config().engine)
    source, command = tmp_path / "in.jsonl", ("must-not-be-started",)
    with pytest.raises(FatalError, match=r"-i .*in.jsonl cannot be read"):
        await run_batch(config, source, tmp_path / "out.jsonl", engine_command=command)
    source.write_text("")
    with pytest.raises(FatalError, match="the same file"):
        await run_batch(config, source, source, engine_command=command)
    odd = ServerConfig(engine=config.engine, chat_template="absent.jinja")
    with pytest.raises(FatalError, match=r"--chat-template absent\.jinja"):
        await run_batch(odd, source, tmp_path / "out.jsonl", engine_command=command)
    progress = await run_batch(config, source, tmp_path / "out.jsonl", engine_command=command)
    assert progress == Progress()
