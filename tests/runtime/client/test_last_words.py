from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

from pagoda_runtime.engine.failure import describe_failure
from pagoda_runtime.errors import FatalError
from pagoda_runtime.ipc.death import count_oom_kills, describe_exit
from pagoda_runtime.last_words import MAX_LINE_BYTES, write_last_words


def test_last_words_are_one_json_line_and_one_line_for_people(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    monkeypatch.setenv("PAGODA_TERMINATION_LOG", str(log))
    write_last_words("DoesNotFit", "two\nlines")
    assert log.read_text() == '{"reason": "DoesNotFit", "message": "two lines"}\n'
    assert capsys.readouterr().err == "pagoda: DoesNotFit: two lines\n"


@pytest.mark.parametrize("character", ["x", "é", "😀"])
def test_a_message_longer_than_kubernetes_keeps_is_cut_to_whole_json(
    tmp_path, monkeypatch, character
):
    log = tmp_path / "log"
    monkeypatch.setenv("PAGODA_TERMINATION_LOG", str(log))
    write_last_words("DoesNotFit", character * 9000)
    assert MAX_LINE_BYTES * 0.9 < log.stat().st_size <= MAX_LINE_BYTES
    assert json.loads(log.read_text())["message"].endswith("…")


def test_a_log_that_cannot_be_written_does_not_hide_the_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAGODA_TERMINATION_LOG", str(tmp_path / "missing" / "log"))
    write_last_words("DoesNotFit", "the message")
    error = capsys.readouterr().err
    assert "the message" in error
    assert "cannot write the termination log" in error


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FatalError("DiskFull", "full"), "DiskFull"),
        (MemoryError(), "OutOfMemory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "OutOfMemory"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "OutOfMemory"),
        (RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"), "OutOfMemory"),
        (OSError(errno.ENOMEM, "no more"), "OutOfMemory"),
        (ImportError("no such module"), "RankDied"),
        (OutOfMemoryError("CUDA out of memory."), "GpuOutOfMemory"),
        (ValueError("odd"), "RankDied"),
    ],
)
def test_every_exception_has_a_reason(error, reason):
    assert describe_failure(error).reason == reason


@pytest.mark.parametrize(
    ("status", "is_out_of_memory", "reason", "words"),
    [
        (-9, True, "OutOfMemory", "the memory limit was reached"),
        (-9, False, "RankDied", "killed by signal 9 (SIGKILL)"),
        (-11, True, "RankDied", "killed by signal 11 (SIGSEGV)"),
        (3, False, "RankDied", "ended with status 3"),
    ],
)
def test_an_exit_without_a_word_is_explained_by_its_status(status, is_out_of_memory, reason, words):
    failure = describe_exit(status, is_out_of_memory)
    assert failure.reason == reason
    assert words in failure.message
    assert "pid" not in failure.message


def test_a_death_is_told_with_who_died_and_when():
    failure = describe_exit(-9, True, "Rank 1 of 2", " in step 7")
    assert failure.message.startswith("Rank 1 of 2 was killed by signal 9 (SIGKILL) in step 7: the")
    assert describe_exit(3, False, "Rank 1 of 2", " in step 7").message.startswith(
        "Rank 1 of 2 ended with status 3 in step 7"
    )


@pytest.mark.parametrize(
    ("own", "counter"),
    [
        ("0::/\n", "memory.events"),
        ("0::/kubepods/pod1\n", "kubepods/pod1/memory.events"),
        ("0::/kubepods/pod1\n", "memory.events"),
        ("4:memory:/docker/7\n0::/\n", "memory/docker/7/memory.oom_control"),
        ("4:cpu,memory:/docker/7\n", "memory/memory.oom_control"),
    ],
)
def test_oom_kills_are_counted_under_either_version_of_cgroups(tmp_path, own, counter):
    for name, text in (
        ("proc/self/cgroup", own),
        (f"sys/fs/cgroup/{counter}", "oom 3\noom_kill 2\noom_group_kill 1\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    assert count_oom_kills(tmp_path) == 2


def test_a_machine_without_cgroups_counts_no_kills(tmp_path):
    assert count_oom_kills(tmp_path) == 0


def test_a_limit_of_the_address_space_is_named():
    """A library as large as any is mapped under a limit, in a process of its own."""
    script = (
        "import resource\n"
        "from pagoda_runtime.engine.failure import describe_failure\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "try:\n"
        "    import torch\n"
        "except Exception as error:\n"
        "    failure = describe_failure(error)\n"
        "    print(failure.reason, failure.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("OutOfMemory The address space, limited to 1073741824 bytes")
    assert "ulimit -v" in done.stdout
