from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from pagoda_kernels.launch import launch


@triton.jit
def double(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    tl.store(out_ptr + offsets, 2 * tl.load(x_ptr + offsets, inside), inside)


@pytest.mark.parametrize("size", [1, 63, 100])
def test_a_kernel_runs_on_the_tensors_of_a_cpu(size):
    x, out = torch.randn(size), torch.zeros(128)
    launch(double, [-(-size // 32)], x, out, size, BLOCK=32)
    assert torch.equal(out[:size], 2 * x)
    assert torch.all(out[size:] == 0.0)
