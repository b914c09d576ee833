from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pagoda_runtime.execution.loading import memory_given_back

MIB = 1 << 20


def resident_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's memory")
def test_memory_between_weights_that_stay_is_given_back_when_it_is_freed():
    # After this glibc keeps pieces of up to 32 MiB: see mallopt(3).
    torch.ones(31 * MIB // 4)
    with memory_given_back():
        before = resident_bytes()
        pieces = [torch.ones(MIB // 4) for _ in range(64)]
        kept = pieces[::2]
        del pieces
        grown = resident_bytes() - before
    assert all(bool(piece.all()) for piece in kept)
    assert grown < 40 * MIB
