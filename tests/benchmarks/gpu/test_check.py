from __future__ import annotations

import time

import pytest
from gpu.check import find_files, format_outcomes, run_files
from gpu.machine import RESULTS, report_path

MIXED = """
import pytest

@pytest.mark.gpu
def test_good(): pass

@pytest.mark.gpu
def test_bad(): assert 1 == 2

@pytest.mark.gpu
@pytest.mark.skip(reason="no")
def test_left_out(): pass

def test_of_a_cpu(): assert False
"""
DYING = """
import os, pytest

@pytest.mark.gpu
def test_dies(): os._exit(3)
"""
HANGING = """
import time, pytest

@pytest.mark.gpu
def test_hangs(): time.sleep(60)
"""


@pytest.fixture
def write(tmp_path):
    # Outside the project's own settings, in which a test for a GPU is left out without one.
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")

    def write_file(name, text):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


def test_all_files_are_run_and_all_failures_told(write, tmp_path):
    files = [write("test_dying.py", DYING), write("test_mixed.py", MIXED)]
    dying, mixed = run_files(files, "gpu", 60.0, at_once=2, root=tmp_path)
    assert not dying.is_good
    assert not mixed.is_good
    assert list(dying.failures) == ["test_dying.py"]
    assert (mixed.passed, mixed.skipped) == (1, 1)
    assert mixed.failures == {"test_mixed::test_bad": "assert 1 == 2"}
    shown = format_outcomes([dying, mixed])
    assert "FAILED test_mixed.py: 1 passed, 1 failed, 1 skipped" in shown
    assert "test_mixed::test_bad: assert 1 == 2" in shown


def test_a_file_that_hangs_is_ended_with_the_time(write, tmp_path):
    started = time.monotonic()
    (hanging,) = run_files([write("test_hanging.py", HANGING)], "gpu", 4.0, 1, root=tmp_path)
    assert time.monotonic() - started < 30.0
    assert hanging.failures["test_hanging.py"].startswith("did not end in ")


def test_files_without_a_test_are_not_good(write, tmp_path):
    (empty,) = run_files([write("test_empty.py", "")], "gpu", 60.0, 1, root=tmp_path)
    assert not empty.is_good


def test_tests_of_every_room_that_has_some_for_a_gpu_are_found():
    found = {path.name for path in find_files(rehearses=False)}
    assert {"test_engine.py", "test_sampler.py"} <= found
    assert {path.parent.name for path in find_files(rehearses=True)} == {"gpu"}


def test_a_rehearsal_is_not_written_among_results():
    assert report_path("gpu-check", None, rehearses=False) == RESULTS / "gpu-check.json"
    assert report_path("gpu-check", None, rehearses=True).name == "gpu-check-rehearsal.json"
    with pytest.raises(SystemExit, match="this is a rehearsal"):
        report_path("gpu-check", RESULTS / "gpu-check.json", rehearses=True)
