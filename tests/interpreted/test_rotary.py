from __future__ import annotations

import numpy as np
import pytest
import torch

from pagoda_kernels.rotary import rotary
from pagoda_kernels.rotary.reference import rotary_reference


@pytest.mark.parametrize("num_tokens", [1, 63, 100])
@pytest.mark.parametrize("num_pairs", [1, 20, 48, 64, 128])
def test_angles_equal_their_specification(num_tokens, num_pairs):
    positions = torch.arange(num_tokens) * 1009
    frequencies = 10_000.0 ** -torch.linspace(0, 1, num_pairs)
    for ours, expected in zip(
        rotary(positions, frequencies, 1.25),
        rotary_reference(positions, frequencies, 1.25),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_angles_of_all_sizes_and_quarters_are_exact():
    """An angle for each token: small ones, the corners between quarters, the largest that occur."""
    corners = torch.arange(0, 4096) * (torch.pi / 4)
    angles = torch.cat((torch.logspace(-6, 7, 4096), corners, corners + 1e-3)).float()
    cos, sin = rotary(torch.ones(1, dtype=torch.int64), angles)
    expected = angles.double().numpy()
    of_pairs = slice(len(angles), None)
    torch.testing.assert_close(
        cos[0, 0, of_pairs].double(), torch.from_numpy(np.cos(expected)), atol=1e-7, rtol=0
    )
    torch.testing.assert_close(
        sin[0, 0, of_pairs].double(), torch.from_numpy(np.sin(expected)), atol=1e-7, rtol=0
    )
