from __future__ import annotations

import math

import pytest
import torch

from pagoda_kernels.rotary import rotary

POSITIONS = torch.tensor([0, 1, 7, 131_071, 1_048_575])
FREQUENCIES = torch.tensor([1.0, 0.25])


def expected(function, sign):
    """Of angles that fp32 holds exactly."""
    rows = []
    for position in POSITIONS.tolist():
        values = [2.0 * function(position * f) for f in FREQUENCIES.tolist()]
        rows.append([[sign * value for value in values] + values])
    return torch.tensor(rows)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_angles_are_exact_in_the_longest_contexts(device):
    cos, sin = rotary(POSITIONS.to(device), FREQUENCIES.to(device), 2.0)
    torch.testing.assert_close(cos.cpu(), expected(math.cos, 1.0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sin.cpu(), expected(math.sin, -1.0), atol=1e-6, rtol=1e-6)


def test_a_factor_scales_cos_and_sin():
    plain = rotary(POSITIONS, FREQUENCIES)
    scaled = rotary(POSITIONS, FREQUENCIES, 1.5)
    torch.testing.assert_close(scaled, tuple(part * 1.5 for part in plain))
