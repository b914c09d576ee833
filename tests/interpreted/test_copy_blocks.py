from __future__ import annotations

import itertools
import random

import pytest
import torch

from pagoda_kernels.copy_blocks import copy_blocks
from pagoda_kernels.copy_blocks.reference import copy_blocks_reference
from pagoda_kernels.kv_cache import make_kv_cache
from pagoda_kernels.testing import watch_moves

CPU = torch.device("cpu")


def make_tensors(num_layers, shape, dtype):
    torch.manual_seed(0)
    caches = [make_kv_cache(shape, dtype, CPU) for _ in range(num_layers)]
    tensors = list(itertools.chain(*(cache.tensors for cache in caches)))
    for tensor in tensors:
        tensor.copy_(torch.randint(0, 255, tensor.shape))
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(40, 2, 1, 6), (40, 16, 3, 80)])
@pytest.mark.parametrize(
    ("sources", "targets"),
    [
        ([1], [3]),
        ([1, 1, 5], [3, 4, 2]),
        ([1, 2, 3], [2, 3, 4]),
        ([1, 2, 3], [3, 1, 2]),
        ([0, 39], [39, 0]),
        (list(range(20)), list(range(39, 19, -1))),
        (random.Random(0).choices(range(40), k=40), random.Random(1).sample(range(40), 40)),
    ],
)
def test_blocks_are_copied_as_specified(dtype, shape, sources, targets):
    tensors, expected = make_tensors(2, shape, dtype), make_tensors(2, shape, dtype)
    copy_blocks(tensors, sources, targets)
    copy_blocks_reference(expected, sources, targets)
    for tensor, other in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, other)


def test_numbers_are_moved_once():
    tensors = make_tensors(2, (6, 16, 1, 64), torch.int8)
    with watch_moves() as moves:
        copy_blocks(tensors, [1, 2], [2, 4])
    for tensor in tensors:
        words = tensor.view(torch.int32)
        for counts, blocks in ((moves.loads(words), [1, 2]), (moves.stores(words), [2, 4])):
            assert torch.all(counts[blocks] == 1)
            assert counts.sum() == words[blocks].numel()


def test_blocks_of_part_of_a_word_are_refused():
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        copy_blocks([torch.zeros(3, 2, dtype=torch.uint8)], [1], [2])


def test_blocks_beyond_2_to_the_31_bytes_are_copied():
    """Pages that nobody touches take no memory."""
    tensor = torch.empty((1 << 31) // 64 + 2, 64, dtype=torch.uint8)
    tensor[0] = torch.arange(64)
    copy_blocks([tensor], [0], [len(tensor) - 1])
    assert torch.equal(tensor[-1], tensor[0])
