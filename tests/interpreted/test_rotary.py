from __future__ import annotations

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
