from __future__ import annotations

import numpy as np
from numba import njit

from pagoda_kernels.cpu.compiled import exp2 as exp2_part


@njit
def exp2(power):
    return exp2_part(power)


def test_powers_of_two_are_as_exact_as_bf16_weights_need():
    powers = np.linspace(-126, 126, 20_011, dtype=np.float32)
    found = np.array([exp2(power) for power in powers])
    np.testing.assert_allclose(found, np.exp2(powers.astype(np.float64)), rtol=1e-5)
    assert exp2(np.float32(-127.5)) == exp2(np.float32(-np.inf)) == 0.0
