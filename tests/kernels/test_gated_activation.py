from __future__ import annotations

import pytest
import torch

from pagoda_kernels.gated_activation import ACTIVATIONS, gated_activation


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [63, 3072])
def test_a_gpu_gives_the_gates_of_the_cpu(activation, size):
    torch.manual_seed(0)
    gate_up = torch.randn(5, 2 * size).bfloat16()
    expected = gated_activation(gate_up.double(), activation).float()
    result = gated_activation(gate_up.cuda(), activation).cpu()
    torch.testing.assert_close(result.float(), expected, atol=1e-5, rtol=2**-8)
