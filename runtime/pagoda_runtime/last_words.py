"""What a process that cannot serve leaves behind, for the operator and for a person."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pagoda_runtime.errors import FATAL_REASONS

TERMINATION_LOG_VARIABLE = "PAGODA_TERMINATION_LOG"
DEFAULT_TERMINATION_LOG = Path("/dev/termination-log")
# Kubernetes keeps the last 4096 bytes of the file; a cut line would be no JSON.
MAX_LINE_BYTES = 4096


def write_last_words(reason: str, message: str) -> None:
    """Write one JSON line {"reason", "message"} to the termination log, and the message to stderr.

    The log is the file that PAGODA_TERMINATION_LOG names, else /dev/termination-log if it exists.
    A log that cannot be written is said on stderr; it never hides the message itself.
    """
    assert reason in FATAL_REASONS, reason
    one_line = " ".join(message.split())
    print(f"pagoda: {reason}: {one_line}", file=sys.stderr, flush=True)
    named = os.environ.get(TERMINATION_LOG_VARIABLE)
    if not named and not DEFAULT_TERMINATION_LOG.exists():
        return
    path = Path(named) if named else DEFAULT_TERMINATION_LOG
    try:
        path.write_text(_render(reason, one_line) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"pagoda: cannot write the termination log {path}: {error}", file=sys.stderr)


def _render(reason: str, message: str) -> str:
    line = json.dumps({"reason": reason, "message": message})
    while len(line) >= MAX_LINE_BYTES:
        # One character of the message takes up to 12 bytes of JSON, so this ends after few rounds.
        excess = max(16, (len(line) - MAX_LINE_BYTES) // 12)
        message = message[: -excess - 1] + "…"
        line = json.dumps({"reason": reason, "message": message})
    return line
