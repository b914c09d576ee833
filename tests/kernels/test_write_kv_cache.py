from __future__ import annotations

import pytest
import torch

from pagoda_kernels.write_kv_cache import write_kv_cache


def test_each_token_goes_to_its_slot_and_nothing_else_changes():
    cache = torch.full((5, 4, 2, 3, 8), torch.nan)
    kv = torch.randn(3, 2, 3, 8)
    write_kv_cache(kv, cache, torch.tensor([17, 4, 6]))
    torch.testing.assert_close(cache[4, 1], kv[0])
    torch.testing.assert_close(cache[1, 0], kv[1])
    torch.testing.assert_close(cache[1, 2], kv[2])
    assert int(cache.isnan().sum()) == (5 * 4 - 3) * 2 * 3 * 8


def test_a_part_of_a_wider_projection_is_written_without_a_copy():
    cache = torch.zeros(2, 4, 2, 1, 8)
    qkv = torch.randn(2, 5, 8)
    write_kv_cache(qkv[:, 3:].unflatten(1, (2, 1)), cache, torch.tensor([5, 6]))
    torch.testing.assert_close(cache[1, 1:3, :, 0], qkv[:, 3:])


@pytest.mark.parametrize(
    ("kv", "slots", "message"),
    [
        (torch.zeros(1, 2, 3, 9), torch.tensor([4]), "must be .num_tokens, 2, 3, 8"),
        (torch.zeros(1, 2, 3, 8).half(), torch.tensor([4]), "both must agree"),
        (torch.zeros(1, 2, 3, 8), torch.tensor([4, 5]), "must be int64"),
        (torch.zeros(1, 2, 3, 8), torch.tensor([4], dtype=torch.int32), "must be int64"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(kv, slots, message):
    with pytest.raises(ValueError, match=message):
        write_kv_cache(kv, torch.zeros(5, 4, 2, 3, 8), slots)
