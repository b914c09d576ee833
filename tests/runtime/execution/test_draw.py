from __future__ import annotations

import pytest
import torch

from pagoda_runtime.execution.draw import _mix, uniform


@pytest.mark.parametrize("values", [(0, 0), (-3, 0), (0, 7), (2**62, 1)])
def test_uniform_numbers_are_even_over_each_of_their_arguments(values):
    first, second = values
    for numbers in (
        [uniform(seed, first, second) for seed in range(5000)],
        [uniform(first, position, abs(second)) for position in range(5000)],
        [uniform(first, abs(second), attempt) for attempt in range(5000)],
    ):
        assert all(0.0 <= number < 1.0 for number in numbers)
        counts = torch.histc(torch.tensor(numbers), bins=10, min=0.0, max=1.0)
        assert counts.min() > 400
        assert counts.max() < 600


def test_numbers_are_those_of_splitmix64():
    """The first outputs of its reference implementation, seed 1234567."""
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        outputs.append(_mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
