from __future__ import annotations

import pytest
import torch

from pagoda_kernels.cpu import threads
from pagoda_kernels.cpu.formats import int64s
from pagoda_kernels.cpu.threads import ThreadedKernel, claim


def _count(task):
    """Arguments: the number of parts, and where each is counted."""
    num_parts = task[1]
    counts = int64s(task[2], (num_parts,))
    part = claim(task)
    while part < num_parts:
        counts[part] += 1
        part = claim(task)


count = ThreadedKernel(_count)


@pytest.fixture(params=[1, 2, 5])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_parts", [0, 1, 3, 10_000])
def test_every_part_is_claimed_once_whatever_the_number_of_threads(num_threads, num_parts):
    counts = torch.zeros(num_parts, dtype=torch.int64)
    count(num_parts, counts.data_ptr())
    assert torch.all(counts == 1)


def test_without_gnu_openmp_one_thread_does_the_work(monkeypatch):
    monkeypatch.setattr(threads, "_openmp_parallel", lambda: None)
    counts = torch.zeros(100, dtype=torch.int64)
    count(100, counts.data_ptr())
    assert torch.all(counts == 1)
