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
    StoredParameter,
    WrongDtypeError,
)

QKV = [Part("q", 32, num_heads=4), Part("k", 16, num_heads=2), Part("v", 16, num_heads=2)]


def load(layout, dims, tensors, parallel):
    parameter = Parameter(
        layout, dims, dtype=torch.float64, device=torch.device("cpu"), parallel=parallel
    )
    for name, tensor in tensors.items():
        assert dict(parameter.shards())[name].shape == tensor.shape
        dict(parameter.shards())[name].load(tensor)
    return parameter.data


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


@pytest.mark.parametrize("cut", Axis)
@pytest.mark.parametrize("dims", [(OUTPUT, INPUT), (OUTPUT,), (INPUT,)])
def test_the_shares_of_all_ranks_make_the_whole(dims, cut):
    layout = Layout([Part("a", 64)], 32, cut)
    whole = numbered(*(64 if dim is OUTPUT else 32 for dim in dims))
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


def stored_by(rank, size, *dims, cut, tensor, **options):
    layout = Layout([Part("a", 48)], 96, cut)
    parameter = StoredParameter(
        layout,
        dims or None,
        dtypes=(torch.float64,),
        device=torch.device("cpu"),
        parallel=TensorParallel(rank, size),
        **options,
    )
    ((_, shard),) = parameter.shards()
    assert shard.fits(tuple(tensor.shape))
    shard.load(tensor)
    assert parameter.num_bytes == parameter._tensors[0].nbytes
    taken = parameter.take(0)
    assert parameter.take(0) is None
    return taken


SOME = (slice(None), slice(16, 32))


# Packed along the inputs, along the outputs, in streams of 3 bits; a scale for a group of inputs.
@pytest.mark.parametrize(
    ("dims", "cut", "shape", "of_rank_1"),
    [
        ((Dim(Axis.INPUT, 8), OUTPUT), Axis.INPUT, (12, 48), (slice(4, 8), slice(48))),
        ((INPUT, Dim(Axis.OUTPUT, 8)), Axis.OUTPUT, (96, 6), (slice(96), slice(2, 4))),
        # Inputs 32 to 63, and outputs 16 to 31, of 3 words for each 32.
        ((Dim(Axis.INPUT, 32, 3), OUTPUT), Axis.INPUT, (9, 48), (slice(3, 6), slice(48))),
        ((INPUT, Dim(Axis.OUTPUT, 32, 3)), Axis.OUTPUT, (96, 6), (slice(96), slice(0, 3))),
        # Of two groups each rank has a part.
        ((Dim(Axis.INPUT, 48), OUTPUT), Axis.INPUT, (2, 48), (slice(0, 2), slice(48))),
        (
            (Dim(Axis.INPUT, 48, is_whole=True), OUTPUT),
            Axis.OUTPUT,
            (2, 48),
            SOME,
        ),
        ((Dim(None), OUTPUT), Axis.OUTPUT, (7, 48), SOME),
        ((), Axis.OUTPUT, (), ...),
    ],
)
def test_a_rank_has_all_elements_that_hold_a_part_of_its_own(dims, cut, shape, of_rank_1):
    whole = numbered(*shape)
    assert torch.equal(stored_by(1, 3, *dims, cut=cut, tensor=whole), whole[of_rank_1])


def test_a_tensor_in_another_dtype_is_refused_by_both_names():
    with pytest.raises(WrongDtypeError, match="int32 instead of float64"):
        stored_by(0, 1, OUTPUT, cut=None, tensor=torch.zeros(48, dtype=torch.int32))
