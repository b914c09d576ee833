"""What the user sees: phases with their seconds, and a sign of life of what takes long."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .settings import ClusterError

SIGN_OF_LIFE_SECONDS = 10.0
TAIL_LINES = 15


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Print the phase's name and seconds when it has ended, whether well or not."""
    started = time.monotonic()
    outcome = "failed after"
    try:
        yield
        outcome = "done in"
    finally:
        say(f"  {name:<28} {outcome} {time.monotonic() - started:.1f} s")


def run_quietly(
    label: str,
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> None:
    """Run a command whose output goes to `log`, saying every ten seconds that it is alive.

    Raises: ClusterError with the end of the log if the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder
            )
        except FileNotFoundError as error:
            raise ClusterError(f"{label}: {command[0]} is not installed.") from error
        ended = threading.Event()
        watcher = threading.Thread(target=_report, args=(label, log, started, ended), daemon=True)
        watcher.start()
        try:
            status = process.wait()
        finally:
            ended.set()
            watcher.join()
            if process.poll() is None:
                process.kill()
                process.wait()
    if status != 0:
        raise ClusterError(f"{label} failed (status {status}). The end of {log}:\n{tail(log)}")


def _report(label: str, log: Path, started: float, ended: threading.Event) -> None:
    while not ended.wait(SIGN_OF_LIFE_SECONDS):
        seconds = time.monotonic() - started
        last = tail(log, lines=1).strip()[:80]
        say(f"    … {label}: {seconds:.0f} s  {last}")


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a text file; empty if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 300 * lines))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def output_of(*command: str) -> str:
    """Standard output of a short command. Raises ClusterError with its words if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ClusterError(f"{command[0]} is not installed.") from error
    if done.returncode != 0:
        words = done.stderr.strip() or done.stdout.strip()
        raise ClusterError(f"`{' '.join(command)}` ended with status {done.returncode}: {words}")
    return done.stdout
