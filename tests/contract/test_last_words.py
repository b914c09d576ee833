"""Both sides know the same reasons, and the operator reads what the runtime writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagoda_operator import last_words
from pagoda_runtime.errors import FATAL_REASONS
from pagoda_runtime.last_words import write_last_words


def test_the_reasons_are_the_same() -> None:
    assert last_words.FATAL_REASONS == FATAL_REASONS


@pytest.mark.parametrize("reason", FATAL_REASONS)
def test_the_operator_reads_what_the_runtime_writes(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "termination-log"
    monkeypatch.setenv("PAGODA_TERMINATION_LOG", str(log))
    message = 'no folder "/models/x"\nuse --model'
    write_last_words(reason, message)
    words = last_words.parse_last_words(log.read_text())
    assert words is not None
    assert words[0] == reason
    assert words[1].split() == message.split()
