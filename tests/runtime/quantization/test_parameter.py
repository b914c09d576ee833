from __future__ import annotations

import pytest
import torch

from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.quantization.parameter import (
    INPUT,
    OUTPUT,
    Axis,
    Dim,
    Layout,
    Parameter,
    Part,
)

QKV = [Part("q", 32, num_heads=4), Part("k", 16, num_heads=2), Part("v", 16, num_heads=2)]


def load(layout, dims, tensors, parallel):
    parameter = Parameter(
        layout, dims, dtype=torch.int32, device=torch.device("cpu"), parallel=parallel
    )
    for name, tensor in tensors.items():
        assert dict(parameter.shards())[name].shape == tensor.shape
        dict(parameter.shards())[name].load(tensor)
    return parameter.data


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)


# What a matrix is in several formats: plain, packed along the inputs, along the outputs, a scale
# for each group of inputs, one for each output, an index for each input.
FORMATS = [
    (OUTPUT, INPUT),
    (Dim(Axis.INPUT, 8), OUTPUT),
    (INPUT, Dim(Axis.OUTPUT, 8)),
    (Dim(Axis.INPUT, 16), OUTPUT),
    (OUTPUT,),
    (INPUT,),
]


@pytest.mark.parametrize("cut", Axis)
@pytest.mark.parametrize("dims", FORMATS)
def test_the_shares_of_all_ranks_make_the_whole(dims, cut):
    layout = Layout([Part("a", 64)], 32, cut)
    whole = numbered(*((64 if dim.axis is Axis.OUTPUT else 32) // dim.per for dim in dims))
    shares = [load(layout, dims, {"a": whole}, TensorParallel(rank, 2)) for rank in range(2)]
    cut_dims = [index for index, dim in enumerate(dims) if dim.axis is cut]
    if cut_dims:
        assert torch.equal(torch.cat(shares, cut_dims[0]), whole)
    else:
        assert all(torch.equal(share, whole) for share in shares)


def test_each_rank_has_the_heads_that_belong_together():
    tensors = {"q": numbered(32, 4), "k": numbered(16, 4), "v": numbered(16, 4)}
    layout = Layout(QKV, 4, Axis.OUTPUT)
    q, k, v = tensors.values()
    assert torch.equal(
        load(layout, (OUTPUT, INPUT), tensors, TensorParallel()), torch.cat([q, k, v])
    )
    share = load(layout, (OUTPUT, INPUT), tensors, TensorParallel(1, 2))
    assert torch.equal(share, torch.cat([q[16:], k[8:], v[8:]]))


def test_heads_that_are_fewer_than_ranks_are_held_several_times():
    tensors = {"q": numbered(32, 4), "k": numbered(16, 4), "v": numbered(16, 4)}
    layout = Layout(QKV, 4, Axis.OUTPUT)
    q, k, v = tensors.values()
    for rank in range(4):
        share = load(layout, (OUTPUT, INPUT), tensors, TensorParallel(rank, 4))
        own, kv = slice(8 * rank, 8 * rank + 8), slice(8 * (rank // 2), 8 * (rank // 2) + 8)
        assert torch.equal(share, torch.cat([q[own], k[kv], v[kv]]))


@pytest.mark.parametrize("num_outputs", [7, 8, 2])
def test_unequal_shares_are_filled_up_with_zeros(num_outputs):
    layout = Layout([Part("", num_outputs)], 4, Axis.OUTPUT, is_padded=True)
    whole = numbered(num_outputs, 4) + 1
    shares = [
        load(layout, (OUTPUT, INPUT), {"": whole}, TensorParallel(rank, 4)) for rank in range(4)
    ]
    held = -(-num_outputs // 4)
    assert all(share.shape == (held, 4) for share in shares)
    joined = torch.cat(shares)
    assert torch.equal(joined[:num_outputs], whole)
    assert not joined[num_outputs:].any()
