from __future__ import annotations

import pytest
import torch

from pagoda_kernels.copy_blocks import copy_blocks as copy_blocks_op
from pagoda_kernels.kv_cache import KVCache
from pagoda_kernels.paged_attention import AttentionSpec
from pagoda_kernels.paged_attention.reference import ReferenceAttention


def copy_blocks(caches, sources, targets):
    backend = ReferenceAttention(
        AttentionSpec(
            num_heads=1,
            num_kv_heads=1,
            head_dim=4,
            windows=(0,) * len(caches),
            scale=1.0,
            dtype=torch.float32,
            kv_dtype=torch.float32,
            block_size=2,
            device=torch.device("cpu"),
        )
    )
    backend.kv_caches = [KVCache(cache, None) for cache in caches]
    backend.copy_blocks(sources, targets)


def make_caches(num_layers: int = 2, num_blocks: int = 5) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(num_blocks, 2, 2, 1, 4) for _ in range(num_layers)]


def test_blocks_are_copied_in_every_layer_and_others_stay():
    caches = make_caches()
    before = [cache.clone() for cache in caches]
    copy_blocks(caches, sources=[1, 1], targets=[3, 4])
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[[0, 1, 2]], old[[0, 1, 2]])
        assert torch.equal(cache[3], old[1])
        assert torch.equal(cache[4], old[1])


def test_a_target_may_be_the_source_of_another_copy():
    caches = make_caches()
    before = [cache.clone() for cache in caches]
    copy_blocks(caches, sources=[1, 2], targets=[2, 3])
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[2], old[1])
        assert torch.equal(cache[3], old[2])


@pytest.mark.parametrize(
    ("sources", "targets", "shown"),
    [
        ([1], [2, 3], "1 sources and 2 targets"),
        ([1, 2], [3, 3], "repeat"),
        ([1], [5], "Block 5 does not exist"),
        ([-1], [2], "Block -1 does not exist"),
    ],
)
def test_copies_that_make_no_sense_are_refused(sources, targets, shown):
    with pytest.raises(ValueError, match=shown):
        copy_blocks(make_caches(), sources=sources, targets=targets)


@pytest.mark.gpu
def test_a_gpu_copies_chains_as_specified():
    torch.manual_seed(0)
    here = [torch.randn(40, 16, 2, 3, size).bfloat16() for size in (80, 128, 256)]
    there = [tensor.cuda() for tensor in here]
    sources, targets = list(range(40)), [*range(1, 40), 0]
    copy_blocks_op(here, sources, targets)
    copy_blocks_op(there, sources, targets)
    for tensor, other in zip(there, here, strict=True):
        assert torch.equal(tensor.cpu(), other)
