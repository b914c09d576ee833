"""The set-up behind `make demo`, `make test` and others: phases in order, with seconds.

Runs on a bare machine: standard library only, Python 3.11 or newer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CLUSTER = ["python3", str(ROOT / "e2e" / "cluster")]
UV_VERSION = "0.13.8"
GPU_PYTHON_VERSION = "3.12"


class PhaseFailed(Exception):
    """A phase ended with an error; the message says which, and the remedy where we know one."""


def main(argv: Sequence[str]) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 (this file is what says so)
        print("Pagoda needs Python 3.11 or newer as python3.", file=sys.stderr)
        return 1
    target = argv[0] if argv else ""
    try:
        match target:
            case "venv":
                phase("venv", make_venv)
                return 0
            case "gpu-packages":
                phase("gpu-packages", make_gpu_packages)
                return 0
            case "demo":
                return demo()
            case "test":
                return test(argv[1:])
    except PhaseFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print("usage: phases.py venv|gpu-packages|demo|test [pytest arguments]", file=sys.stderr)
    return 2


def phase(name: str, action: Callable[[], None]) -> None:
    """Run one phase and print what it is and how long it took."""
    print(f"== {name}", flush=True)
    started = time.monotonic()
    action()
    print(f"== {name}: {time.monotonic() - started:.1f} s", flush=True)


def demo() -> int:
    started = time.monotonic()
    phase("venv", make_venv)
    phase("model", lambda: run([str(PYTHON), "e2e/model.py"]))
    if not os.environ.get("CONTEXT"):
        phase("cluster", lambda: run([*CLUSTER, "up"]))
    status = subprocess.run([str(PYTHON), "e2e/demo.py"], cwd=ROOT, check=False).returncode
    if status == 0:
        print(f"\nThe demo is up after {time.monotonic() - started:.0f} s.")
    return status


def test(pytest_arguments: Sequence[str]) -> int:
    """Set up, then one pytest run whose closing line is the last that is printed."""
    was_up = subprocess.run([*CLUSTER, "status"], capture_output=True, check=False).returncode == 0
    phase("venv", make_venv)
    phase("model", lambda: run([str(PYTHON), "e2e/model.py"]))
    phase("cluster", lambda: run([*CLUSTER, "up"]))
    phase("images", lambda: run([*CLUSTER, "images"]))
    command = [str(PYTHON), "-m", "pytest", "tests", "e2e", "--durations=30", *pytest_arguments]
    with interpreted() as wait_for_interpreted:
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        # The last that is printed is the closing line above, if nothing failed here.
        status = wait_for_interpreted() or status
    if not was_up:
        subprocess.run([*CLUSTER, "down"], capture_output=True, check=False)
    return status


@contextlib.contextmanager
def interpreted() -> Iterator[Callable[[], int]]:
    """Run `make interpreted` beside the other tests; yields what waits for its exit status.

    In a process of its own: tests/interpreted/conftest.py says why.
    """
    command = ["nice", "make", "--no-print-directory", "interpreted"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

        def wait() -> int:
            if status := process.wait():
                output.seek(0)
                print(output.read(), "`make interpreted` failed.", sep="\n", flush=True)
            return status

        try:
            yield wait
        finally:
            process.terminate()
            process.wait()


def make_venv() -> None:
    """Create .venv from requirements/dev.txt, with the project editable, unless it is there."""
    inputs = (ROOT / "requirements" / "dev.txt", ROOT / "pyproject.toml")
    key = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()
    marker = VENV / ".made-from"
    # An editable install points at the checkout it was made in.
    key += str(ROOT)
    if PYTHON.exists() and marker.exists() and marker.read_text() == key:
        print(f"{VENV} is up to date")
        return
    uv = find_uv()
    run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(VENV)])
    run([uv, "pip", "sync", "--require-hashes", "--python", str(PYTHON), str(inputs[0])])
    run([uv, "pip", "install", "--quiet", "--python", str(PYTHON), "--no-deps", "-e", str(ROOT)])
    marker.write_text(key)


def make_gpu_packages() -> None:
    """Collect requirements/gpu.txt in a folder that goes along to a machine without a network."""
    folder = ROOT / "out" / "gpu-packages"
    shutil.rmtree(folder, ignore_errors=True)
    wheels = ["--python-version", GPU_PYTHON_VERSION, "--python-platform", "x86_64-manylinux_2_28"]
    wheels += ["--only-binary", ":all:", "--no-deps", "--target", str(folder)]
    requirements = ["--require-hashes", "-r", str(ROOT / "requirements" / "gpu.txt")]
    run([find_uv(), "pip", "install", "--quiet", *wheels, *requirements])


def find_uv() -> str:
    """The uv on the PATH, or one of our own in the cache folder."""
    if found := shutil.which("uv"):
        return found
    cache = Path(os.environ.get("PAGODA_CACHE") or Path.home() / ".cache" / "pagoda")
    folder = cache / f"uv-{UV_VERSION}"
    if not (folder / "bin" / "uv").exists():
        shutil.rmtree(folder, ignore_errors=True)
        try:
            run([sys.executable, "-m", "venv", str(folder)])
        except PhaseFailed as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise PhaseFailed(
                f"{error}\nPython's venv module is not complete; on Debian: "
                "apt-get install python3-venv"
            ) from error
        run([str(folder / "bin" / "pip"), "install", "--quiet", f"uv=={UV_VERSION}"])
    return str(folder / "bin" / "uv")


def run(command: Sequence[str]) -> None:
    try:
        status = subprocess.run(list(command), cwd=ROOT, check=False).returncode
    except FileNotFoundError as error:
        raise PhaseFailed(f"{command[0]} is not installed.") from error
    if status != 0:
        raise PhaseFailed(f"`{' '.join(command)}` ended with status {status}.")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
