"""The output of a batch: what survives, and what is refused."""

from __future__ import annotations

import json
import os

import msgspec
import pytest

from pagoda_runtime.batch.lines import BadLine, Line
from pagoda_runtime.batch.results import ResultFile, make_bad_result, make_result
from pagoda_runtime.errors import FatalError
from pagoda_runtime.server.answers import Completion, PromptTokensDetails, Usage
from pagoda_runtime.server.errors import ApiError

LINE = Line(7, "a", "/v1/completions", b"{}")
ANSWER = Completion("cmpl-1", 1, "fake", [], Usage(1, 0, 1, PromptTokensDetails(0)))
ERROR = ApiError(400, "top_p is 2.")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


def write(path, *results):
    file = ResultFile(path)
    for result in results:
        file.write(result)
    file.close()


def test_an_answer_has_openais_form(path):
    write(path, make_result(LINE, ANSWER))
    assert json.loads(path.read_text()) == {
        "id": "batch_req_7",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "cmpl-1",
            "body": msgspec.to_builtins(ANSWER),
        },
        "error": None,
    }


def test_a_refusal_is_shown_as_response_and_as_error_with_the_lines_number(path):
    write(path, make_result(LINE, ERROR))
    result = json.loads(path.read_text())
    assert result["response"]["status_code"] == 400
    assert result["response"]["body"]["error"]["message"] == "top_p is 2."
    assert result["error"] == {
        "code": "invalid_request",
        "message": "Line 7: top_p is 2.",
        "line": 7,
    }


def test_a_bad_line_has_an_error_alone(path):
    write(path, make_bad_result(BadLine(9, None, "invalid_json", "No JSON.")))
    result = json.loads(path.read_text())
    assert result["response"] is None
    assert result["error"] == {"code": "invalid_json", "message": "Line 9: No JSON.", "line": 9}


def test_the_next_run_knows_what_is_done(path):
    bad = make_bad_result(BadLine(9, None, "invalid_json", "No JSON."))
    write(path, make_result(LINE, ANSWER), bad)
    again = ResultFile(path)
    assert (again.custom_ids, again.line_numbers) == ({"a"}, {9})
    again.close()


def test_a_line_that_was_cut_off_at_any_byte_is_removed(path):
    write(path, make_result(LINE, ANSWER))
    whole = path.read_bytes()
    for length in range(1, len(whole)):
        path.write_bytes(whole + whole[:length])
        file = ResultFile(path)
        file.write(make_result(LINE, ANSWER))
        file.close()
        assert path.read_bytes() == whole * 2


@pytest.mark.parametrize("text", ["a diary\n", "a diary", '{"custom_id":"a"}\n', '{"id":5}'])
def test_a_file_of_another_kind_is_refused_and_left_alone(path, text):
    path.write_text(text)
    with pytest.raises(FatalError, match="line 1 is no result") as caught:
        ResultFile(path)
    assert caught.value.reason == "InvalidFlags"
    assert path.read_text() == text


def test_two_runs_cannot_write_the_same_file(path):
    first = ResultFile(path)
    with pytest.raises(FatalError, match="Another process writes"):
        ResultFile(path)
    first.close()
    ResultFile(path).close()


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FatalError, match=r"no/out.jsonl cannot be written"):
        ResultFile(tmp_path / "no" / "out.jsonl")


def test_a_full_disk_says_how_to_go_on(path):
    file = ResultFile(path)
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), file._file)
        with pytest.raises(FatalError, match="run the same command again") as caught:
            file.write(make_result(LINE, ANSWER))
    assert caught.value.reason == "DiskFull"
    file.close()
