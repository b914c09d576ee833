"""Layers of quantized checkpoints against the matrices that their tensors stand for."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.by_module import get_linear_method
from pagoda_runtime.quantization.description import Quantization, everything
from pagoda_runtime.quantization.parameter import Axis, Layout, Part
from pagoda_runtime.quantization.schemes import (
    AWQ,
    EXL2,
    GGUF,
    GGUF_TYPES,
    GPTQ,
    PackedIntegers,
    ScaledNumbers,
)
from pagoda_runtime.quantization.testing import (
    write_awq,
    write_exl2,
    write_gguf,
    write_gptq,
    write_packed,
    write_scaled,
)

CPU = torch.device("cpu")


def scattered(inputs, group_size):
    return (torch.arange(inputs) // group_size)[torch.randperm(inputs)]


def write_scattered(outputs, inputs, *, write=write_gptq, group_size=32, **kinds):
    return write(outputs, inputs, group_size, groups=scattered(inputs, group_size), **kinds)


def write_static(outputs, inputs, **kinds):
    written = write_scaled(outputs, inputs, **kinds)
    written.tensors["input_scale"] = torch.rand(1) + 0.5
    return written


def write_mixed(outputs, inputs):
    """Groups of 32 in all widths; the last takes what is left."""
    widths = [8, 6, 5, 4, 4, 3, 2]
    sizes = [32] * (len(widths) - 1)
    return write_exl2(outputs, inputs, [*zip(widths, [*sizes, inputs - sum(sizes)], strict=True)])


# Format → its scheme, and what writes a matrix of so many outputs and inputs.
FORMATS = {
    "awq": (AWQ(32), partial(write_awq, group_size=32)),
    "awq, groups of 16": (AWQ(16), partial(write_awq, group_size=16)),
    "awq, a group": (AWQ(-1), lambda outputs, inputs: write_awq(outputs, inputs, inputs)),
    **{
        f"gptq, {bits} bits": (GPTQ(bits, 64), partial(write_gptq, group_size=64, bits=bits))
        for bits in (2, 3, 4, 8)
    },
    "gptq, a group": (GPTQ(4, -1), partial(write_gptq, group_size=-1)),
    "gptq, v2": (GPTQ(4, 64, is_v2=True), partial(write_gptq, group_size=64, is_v2=True)),
    "gptq, symmetric": (GPTQ(4, 32), partial(write_gptq, group_size=32, is_symmetric=True)),
    "gptq, scattered": (GPTQ(4, 32, desc_act=True), write_scattered),
    "gptq, 3 bits, scattered": (GPTQ(3, 32, desc_act=True), partial(write_scattered, bits=3)),
    "packed": (PackedIntegers(4, 64), partial(write_packed, group_size=64)),
    "packed, rows": (PackedIntegers(4, -1), partial(write_packed, group_size=-1)),
    "packed, 8 bits": (PackedIntegers(8, 32), partial(write_packed, group_size=32, bits=8)),
    "packed, zeros": (
        PackedIntegers(4, 32, is_symmetric=False),
        partial(write_packed, group_size=32, is_symmetric=False),
    ),
    "packed, zeros of rows": (
        PackedIntegers(8, -1, is_symmetric=False),
        partial(write_packed, group_size=-1, bits=8, is_symmetric=False),
    ),
    "packed, scattered": (PackedIntegers(4, 32), partial(write_scattered, write=write_packed)),
    **{
        f"{numbers}, {scales_of}": (
            ScaledNumbers(numbers, 128 if scales_of == "block" else 0, "dynamic"),
            partial(write_scaled, numbers=numbers, scales_of=scales_of),
        )
        for numbers in ("e4m3", "int8")
        for scales_of in ("tensor", "channel", "block")
    },
    "e4m3, static": (ScaledNumbers("e4m3", 0, "static"), write_static),
    "int8, x as it is": (
        ScaledNumbers("int8", 0, "none"),
        partial(write_static, numbers="int8", scales_of="channel"),
    ),
    "exl2": (EXL2(), write_mixed),
    **{f"gguf, {kind}": (GGUF(kind), partial(write_gguf, kind=kind)) for kind in GGUF_TYPES},
}


def make(scheme, layout, written, *, rank=0, size=1, activation=None, bias=None, **options):
    """A layer of these matrices, as a rank has it, loaded through its shards."""
    quantization = Quantization("any", (everything(scheme),))
    parallel = TensorParallel(rank, size)
    choose = get_linear_method(quantization)
    placement = Placement(torch.float64, CPU, choose, parallel, path="layer", **options)
    method = placement.method(placement, activation)
    weights = method.create_weights(layout, has_bias=bias is not None)
    for name, parameter in weights.items():
        for part, shard in parameter.shards():
            tensor = bias if name == "bias" else written[part].tensors.get(name)
            if tensor is None:
                assert parameter.is_optional
                continue
            assert shard.fits(tuple(tensor.shape)), (name, shard.shape, tensor.shape)
            shard.load(tensor)
    method.after_loading(weights)
    assert all(parameter.num_bytes == 0 for name, parameter in weights.items() if name != "bias")
    return method


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(result, expected):
    # Scales and numbers are multiplied in fp32.
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_is_the_product_with_the_matrix_that_its_tensors_stand_for(name):
    scheme, write = FORMATS[name]
    written = write(64, 256)
    method = make(scheme, Layout([Part("a", 64)], 256), {"a": written})
    x = torch.randn(5, 256, dtype=torch.float64)
    assert_close(method.apply(x), x @ written.weight.T)


# Shares begin within words, groups and blocks.
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [2, 8, 16])
@pytest.mark.parametrize("cut", Axis)
def test_all_ranks_together_have_the_product_of_one(name, cut, size):
    scheme, write = FORMATS[name]
    # A 16th is no whole group of 32.
    inputs = 768 if name.endswith("_K") else 320
    written = write(96, inputs)
    layout = Layout([Part("a", 96)], inputs, cut)
    x = torch.randn(3, inputs, dtype=torch.float64)
    shares = []
    for rank in range(size):
        own = layout.own(Axis.INPUT, layout.parts[0], TensorParallel(rank, size))
        method = make(scheme, layout, {"a": written}, rank=rank, size=size)
        shares.append(method.apply(x[:, own.start : own.stop]))
    result = torch.cat(shares, 1) if cut is Axis.OUTPUT else sum(shares)
    assert_close(result, x @ written.weight.T)
    one = make(scheme, layout, {"a": written})
    assert_close(result, one.apply(x))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1, 2])
def test_stacked_parts_have_scales_and_orders_of_their_own(name, size):
    scheme, write = FORMATS[name]
    parts = [Part("q", 64, num_heads=4), Part("k", 32, num_heads=2), Part("v", 32, num_heads=2)]
    written = {part.name: write(part.size, 256) for part in parts}
    x = torch.randn(3, 256, dtype=torch.float64)
    layout = Layout(parts, 256, Axis.OUTPUT)
    for rank in range(size):
        expected = [
            x @ written[part.name].weight[own.start : own.stop].T
            for part in parts
            for own in [layout.own(Axis.OUTPUT, part, TensorParallel(rank, size))]
        ]
        method = make(scheme, layout, written, rank=rank, size=size)
        assert_close(method.apply(x), torch.cat(expected, 1))


@pytest.mark.parametrize("name", FORMATS)
def test_a_gate_and_a_bias_are_those_of_the_layer(name):
    scheme, write = FORMATS[name]
    parts = [Part("gate", 32), Part("up", 32)]
    written = {part.name: write(32, 256) for part in parts}
    x, bias = torch.randn(3, 256, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    method = make(scheme, Layout(parts, 256), written, activation="silu", bias=bias)
    gate, up = (x @ written[part.name].weight.T + bias for part in parts)
    assert_close(method.apply(x), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("name", FORMATS)
def test_a_vocabulary_that_ranks_cannot_divide_evenly_is_filled_up_with_zeros(name):
    scheme, write = FORMATS[name]
    num_tokens = 96
    written = write(num_tokens, 256)
    x = torch.randn(3, 256, dtype=torch.float64)
    layout = Layout([Part("", num_tokens)], 256, Axis.OUTPUT, is_padded=True)
    shares = [make(scheme, layout, {"": written}, rank=rank, size=5).apply(x) for rank in range(5)]
    assert all(share.shape == (3, 20) for share in shares)
    joined = torch.cat(shares, 1)
    assert_close(joined[:, :num_tokens], x @ written.weight.T)
    assert not joined[:, num_tokens:].any()


@pytest.mark.parametrize("name", ["awq", "gptq, scattered", "exl2", "e4m3, block"])
def test_with_fixed_rows_a_result_does_not_depend_on_other_rows(name):
    scheme, write = FORMATS[name]
    layout = Layout([Part("a", 64)], 256)
    method = make(scheme, layout, {"a": write(64, 256)}, is_deterministic=True)
    x = torch.randn(21, 256, dtype=torch.float64)
    together = method.apply(x)
    assert all(torch.equal(method.apply(x[i : i + 1]), together[i : i + 1]) for i in range(21))
