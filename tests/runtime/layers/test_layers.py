from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch.nn.functional import layer_norm

from pagoda_runtime.layers.attention import AttentionHeads, QKNorm
from pagoda_runtime.layers.embedding import Embedding
from pagoda_runtime.layers.linear import Linear
from pagoda_runtime.layers.mlp import MLP
from pagoda_runtime.layers.module import Module
from pagoda_runtime.layers.norm import LayerNorm, RMSNorm, add_and_norm
from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.parameter import Axis, Part
from pagoda_runtime.quantization.unquantized import UnquantizedLinear

CPU = torch.device("cpu")


def place(dtype=torch.float32, rank=0, size=1):
    return Placement(dtype, CPU, UnquantizedLinear, TensorParallel(rank, size))


def load(module, tensors):
    shards = dict(module.shards())
    assert set(shards) == set(tensors)
    for name, shard in shards.items():
        shard.load(tensors[name])
    module.after_loading()
    return module


def make_norm(weight, offset=0.0):
    norm = RMSNorm(len(weight), eps=1e-6, weight_offset=offset, placement=place(weight.dtype))
    return load(norm, {".weight": weight})


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_equals_its_definition(scale, offset):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 48) * scale, torch.randn(48)
    expected = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (weight + offset)
    norm = make_norm(weight, offset)
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-5)
    total = torch.ones(5, 48)
    assert torch.equal(add_and_norm(total, x, norm, norm), norm(total))
    torch.testing.assert_close(total, expected + 1, atol=1e-5, rtol=1e-5)


def test_a_row_of_zeros_stays_zero():
    assert torch.all(make_norm(torch.ones(8))(torch.zeros(2, 8)) == 0)


def test_one_plus_a_small_bf16_weight_is_not_rounded_away():
    weight = torch.full((64,), 1e-3, dtype=torch.bfloat16)
    assert make_norm(weight, 1.0).weights.weight[0].item() / 8 == pytest.approx(1.001, abs=1e-5)


@pytest.mark.parametrize("weight", [-0.9973, -0.9951])
def test_a_stored_fp32_weight_keeps_its_bits_in_a_bf16_model(weight):
    """In bf16 both would be -0.9961: of what is left of 1 half as much again, or a fifth less."""
    norm = RMSNorm(4, eps=0.0, weight_offset=1.0, placement=place(torch.bfloat16))
    load(norm, {".weight": torch.full((4,), weight)})
    torch.testing.assert_close(norm(torch.ones(1, 4)), torch.full((1, 4), 1 + weight).bfloat16())


def test_layer_norm_takes_fp32_and_gives_the_models_dtype():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 48), torch.randn(48).bfloat16(), torch.randn(48).bfloat16()
    norm = LayerNorm(48, eps=1e-5, placement=place(torch.bfloat16))
    load(norm, {".weight": weight, ".bias": bias})
    expected = layer_norm(x, (48,), weight.float(), bias.float(), 1e-5)
    assert torch.equal(norm(x), expected.bfloat16())
    total = torch.ones(5, 48)
    assert torch.equal(add_and_norm(total, x.bfloat16(), norm, norm), norm(total))
    torch.testing.assert_close(total, expected + 1, atol=0.05, rtol=0.02)


def test_matrices_that_a_layer_stacks_keep_their_names():
    parts = [Part("q", 3), Part("k", 2)]
    layer = Linear(4, parts, cut=Axis.OUTPUT, bias=True, placement=place())
    shards = dict(layer.shards("a.qk"))
    assert set(shards) == {"a.q.weight", "a.q.bias", "a.k.weight", "a.k.bias"}
    for index, name in enumerate(("a.q.weight", "a.q.bias", "a.k.weight", "a.k.bias")):
        shards[name].load(torch.full(shards[name].shape, float(index)))
    layer.after_loading()
    out = layer(torch.ones(1, 4), None)
    assert out.tolist() == [[1.0, 1.0, 1.0, 11.0, 11.0]]


def test_the_parts_of_a_module_are_found_in_attributes_and_lists():
    model = Module()
    norms = [RMSNorm(8, eps=1e-6, placement=place()) for _ in range(3)]
    model.norm, model.layers = norms[0], norms[1:]
    names = ["norm.weight", "layers.0.weight", "layers.1.weight"]
    assert [name for name, _ in model.shards()] == names
    model.after_loading()
    assert not list(model.shards())
    assert [module.weight_bytes for module in model.modules()] == [0, 32, 32, 32]


def test_a_loaded_tensor_is_dropped_as_soon_as_it_is_used():
    """Without the garbage collector's help: a model would be held twice until it came."""
    gc.disable()
    try:
        norm = RMSNorm(8, eps=1e-6, placement=place())
        tensor = weakref.ref(norm.parameters["weight"].data)
        load(norm, {".weight": torch.ones(8)})
        assert tensor() is None
    finally:
        gc.enable()


def loaded_qk_norm(q_norm, k_norm, rotary_dim):
    heads = AttentionHeads(2, 1, len(q_norm))
    norm = QKNorm(heads, rotary_dim=rotary_dim, eps=1e-6, weight_offset=0.0, placement=place())
    tensors = {"a.q_norm.weight": q_norm, "a.k_norm.weight": k_norm}
    for name, shard in norm.shards("a.qk_norm"):
        shard.load(tensors[name])
    norm.after_loading()
    return norm.norm.weight / len(q_norm) ** 0.5


def test_heads_norms_are_repeated_for_each_head():
    weight = loaded_qk_norm(torch.ones(4), torch.full((4,), 3.0), 4)
    assert weight.tolist() == [[1.0] * 4, [1.0] * 4, [3.0] * 4]


def test_large_dimensions_of_keys_become_those_of_queries_by_powers_of_two():
    # Of two pairs that are rotated, and of two dimensions that are not.
    k_norm = torch.tensor([1.0, 20.0, 1.0, 1.0, -9.0, 0.0])
    q, _, k = loaded_qk_norm(torch.ones(6), k_norm, 4)
    assert torch.allclose(q, torch.tensor([1.0, 16.0, 1.0, 16.0, 8.0, 1.0]))
    assert torch.allclose(k, torch.tensor([1.0, 1.25, 1.0, 0.0625, -1.125, 0.0]))


@pytest.mark.parametrize("is_gated", [True, False])
def test_the_results_of_two_ranks_add_up_to_that_of_one(is_gated):
    torch.manual_seed(0)
    names = {"mlp.gate_proj.weight": (48, 16)} if is_gated else {}
    names |= {"mlp.up_proj.weight": (48, 16), "mlp.down_proj.weight": (16, 48)}
    tensors = {name: torch.randn(shape) for name, shape in names.items()}

    def run(rank, size):
        model = Module()
        model.mlp = MLP(
            16,
            48,
            activation="silu",
            is_gated=is_gated,
            bias=False,
            placement=place(rank=rank, size=size),
        )
        return load(model, tensors).mlp(x, None)

    x = torch.randn(5, 16)
    torch.testing.assert_close(run(0, 2) + run(1, 2), run(0, 1), atol=1e-4, rtol=1e-4)


def test_the_scale_of_an_embedding_is_rounded_to_its_dtype():
    embedding = Embedding(4, 2, scale=math.sqrt(640), placement=place(torch.bfloat16))
    load(embedding, {".weight": torch.ones(4, 2)})
    assert embedding(torch.tensor([3]))[0, 0].item() == 25.25
