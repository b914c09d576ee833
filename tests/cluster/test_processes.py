from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from cluster.processes import ProcessId, Program, running, start, stop
from cluster.settings import ClusterError, Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state=tmp_path / "state", cache=tmp_path / "cache")


def test_a_started_program_is_found_again_by_its_pid_file_and_ends_when_stopped(
    settings: Settings,
) -> None:
    process = start(settings, Program("sleeper", ["sleep", "60"]))
    assert running(settings, "sleeper") == process
    stop(settings, "sleeper")
    assert not process.is_alive
    assert not (settings.pids / "sleeper").exists()


def test_a_pid_that_went_to_a_stranger_is_not_signalled(settings: Settings) -> None:
    process = start(settings, Program("stranger", ["sleep", "60"]))
    try:
        # As if the machine had restarted: the same pid, another time of start.
        ProcessId(process.pid, process.start_ticks - 1).write(settings.pids / "ours")
        assert running(settings, "ours") is None
        stop(settings, "ours")
        assert process.is_alive
    finally:
        stop(settings, "stranger")


def test_a_program_that_ignores_sigterm_is_killed(settings: Settings) -> None:
    ready = settings.state / "ready"
    script = f'trap "" TERM; mkdir -p {settings.state}; touch {ready}; while :; do sleep 0.05; done'
    process = start(settings, Program("stubborn", ["sh", "-c", script]))
    while not ready.exists():
        os.sched_yield()
    stop(settings, "stubborn", grace_seconds=0.1)
    assert not process.is_alive


@pytest.mark.parametrize("text", ["", "12", "12 x", "1 2 3"])
def test_a_half_written_pid_file_names_no_process(tmp_path: Path, text: str) -> None:
    (tmp_path / "pid").write_text(text)
    assert ProcessId.read(tmp_path / "pid") is None


def test_an_ended_child_that_nobody_waited_for_is_not_alive() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    process = ProcessId.of(pid)
    assert process is not None
    assert process.is_alive
    os.kill(pid, signal.SIGKILL)
    # WNOWAIT: it stays a zombie, which still has its pid and its time of start.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert not process.is_alive
    os.waitpid(pid, 0)


def test_a_program_that_is_not_installed_says_so(settings: Settings) -> None:
    with pytest.raises(ClusterError, match="pagoda-no-such-program"):
        start(settings, Program("absent", ["pagoda-no-such-program"]))
    assert running(settings, "absent") is None
