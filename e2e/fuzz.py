"""`make fuzz-api`: schemathesis on the whole API of a server with a fake engine.

What it sends is made from /openapi.json: values that fit the schemas, and many that do not. No
answer may be a 5xx, and each must be what the document says. Schemathesis lives in an environment
of its own in the cache folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from environments import make_environment

from pagoda_runtime.server.testing_process import ServerProcess

SCHEMATHESIS = "schemathesis==4.32.5"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
FLAGS = ["--disable-access-log", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]
MODEL = "fake:" + json.dumps({"vocab_size": 256, "max_model_len": 256})


def fuzz(seconds: int, seed: int, folder: Path) -> tuple[int, dict[str, Any]]:
    """The exit status of schemathesis, and its report."""
    programs = make_environment("fuzz", [SCHEMATHESIS])
    command = ["pagoda_runtime.server.testing", MODEL, "--host", "127.0.0.1", "--port", "0"]
    server = ServerProcess([*command, *FLAGS], folder / "termination-log")
    try:
        url = server.wait_until_ready()
        report = folder / "report.json"
        arguments = ["run", f"{url}/openapi.json", "--checks", ",".join(CHECKS)]
        arguments += ["--max-time", str(seconds), "--seed", str(seed), "--continue-on-failure"]
        arguments += ["--report-json-path", str(report), "--max-examples", "100000"]
        arguments += ["--generation-database", "none", "--request-timeout", "60"]
        arguments += ["--suppress-health-check", "all"]
        hooks = {"SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": str(Path(__file__).parent)}
        status = subprocess.run(
            [programs / "schemathesis", *arguments],
            cwd=folder,
            check=False,
            env={**os.environ, **hooks},
        ).returncode
        assert server.process.poll() is None, "the server has ended:\n" + "".join(server.lines)
        found: dict[str, Any] = json.loads(report.read_text())
        # It names folders of this machine.
        del found["command"]
        found["server_errors"] = sum("Traceback" in line for line in server.lines)
        return status, found
    finally:
        server.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        status, report = fuzz(args.seconds, args.seed, Path(folder))
    if args.out is not None:
        head = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python "
            f"{platform.python_version()}",
            "schemathesis": SCHEMATHESIS.partition("==")[2],
            "seconds": args.seconds,
            "seed": args.seed,
            "exit_status": status,
        }
        args.out.write_text(json.dumps(head | report, indent=1) + "\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
