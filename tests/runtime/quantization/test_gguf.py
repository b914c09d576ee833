"""GGUF files whose blocks are written here bit by bit, against the numbers that these stand for."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pagoda_kernels.cpu.grouped_linear import has_grouped_panels
from pagoda_kernels.grouped_linear import Grouped, GroupedShape
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.convert import convert
from pagoda_runtime.convert.testing import tensors_of, write_gguf
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution.runner import ModelRunner, no_progress
from pagoda_runtime.execution.testing import generate_with_logits
from pagoda_runtime.models.source import resolve_model
from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.by_module import get_linear_method
from pagoda_runtime.quantization.description import Quantization, everything
from pagoda_runtime.quantization.gguf import _with_zeros
from pagoda_runtime.quantization.parameter import Layout, Part
from pagoda_runtime.quantization.schemes import GGUF, GGUF_TYPES
from pagoda_runtime.quantization.testing import write_gguf as write_blocks

PROMPTS = [[5, 9, 100, 7, 42], list(range(40, 70))]
SIZE = 8
"""Of a model whose rows are blocks of 256."""


@pytest.fixture(autouse=True)
def seed(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_blocks_stand_for_what_the_format_s_own_reader_makes_of_them(kind):
    """Of the writer, with which all else is tested."""
    written = write_blocks(16, 512, kind)
    found = gguf.quants.dequantize(
        written.tensors["qweight"].numpy(), gguf.GGMLQuantizationType[kind]
    )
    torch.testing.assert_close(torch.from_numpy(found), written.weight.float())


def write_model(path, kind_of, *, is_tied=True):
    """A file in which matrices are in blocks, and the same weights by the file's names."""
    plain = tensors_of("llama", SIZE)
    if not is_tied:
        plain["output.weight"] = plain["token_embd.weight"]
    blocks = {}
    for name, tensor in plain.items():
        if tensor.ndim == 2 and (kind := kind_of(name)):
            written = write_blocks(*tensor.shape, kind)
            blocks[name] = kind, written.tensors["qweight"].numpy()
            plain[name] = written.weight.numpy()
    return write_gguf(path, "llama", blocks=blocks, size=SIZE), plain


def q4_k_m(name):
    """Another type for v than for q and k, as such files have it."""
    if "token_embd" in name or "attn_v" in name or "ffn_down" in name:
        return "Q6_K"
    return "Q4_K"


def make_runner(folder, **flags):
    values = {"dtype": "float32", "num_threads": 1, "kv_cache_memory_bytes": 1 << 22} | flags
    return ModelRunner(EngineConfig(model=str(folder), **values), no_progress, TensorParallel())


KINDS = {"Q4_K_M": q4_k_m, **{kind: lambda name, kind=kind: kind for kind in GGUF_TYPES}}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_served_with_the_numbers_of_its_blocks(tmp_path, kind, is_tied):
    source, plain = write_model(tmp_path / "a.gguf", KINDS[kind], is_tied=is_tied)
    exact = {name: tensor.astype(np.float32) for name, tensor in plain.items()}
    # What is no product's matrix is in bf16.
    for name, tensor in exact.items():
        if tensor.ndim == 1 or name == "token_embd.weight":
            exact[name] = torch.from_numpy(tensor).bfloat16().float().numpy()
    oracle = write_gguf(tmp_path / "b.gguf", "llama", extra=exact, size=SIZE)
    convert(oracle, tmp_path / "oracle", dtype="float32")
    expected, found = (
        generate_with_logits(make_runner(folder), PROMPTS, 3)
        for folder in (tmp_path / "oracle", source)
    )
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], atol=2e-3, rtol=1e-3)


def test_without_quantization_a_file_is_dequantized(tmp_path):
    source, _ = write_model(tmp_path / "a.gguf", q4_k_m)
    convert(source, tmp_path / "plain")
    found = resolve_model(str(source), None, quantization="none")
    for name in ("config.json", "model.safetensors"):
        assert (found / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert resolve_model(str(source), None, quantization="int8") == found
    with_blocks = resolve_model(str(source), None)
    assert resolve_model(str(source), None, quantization="gguf") == with_blocks != found


def test_another_method_is_refused(tmp_path):
    source, _ = write_model(tmp_path / "a.gguf", q4_k_m)
    with pytest.raises(FatalError, match=r"--quantization awq .* is quantized by gguf") as caught:
        make_runner(source, quantization="awq")
    assert caught.value.reason == "QuantizationMismatch"


def test_what_has_no_product_is_dequantized_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    name = "blk.0.ffn_up.weight"
    rows = np.zeros((512, 110), np.uint8)
    source = write_gguf(tmp_path / "a.gguf", "llama", blocks={name: ("Q3_K", rows)}, size=SIZE)
    weights = load_file(resolve_model(str(source), None) / "model.safetensors")
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype is torch.bfloat16
    assert "1 tensors in Q3_K are dequantized to bfloat16" in caplog.messages


def test_groups_without_a_scale_keep_their_least_number():
    integers = torch.randint(0, 16, (3, 64), dtype=torch.uint8)
    scales = torch.tensor([[0.0, 0.5], [1e-7, 0.0], [-0.25, 1.0]])
    least = torch.tensor([[0.75, 2.0], [0.5, 0.0], [3.0, 0.0]])
    rows = _with_zeros(Grouped(integers, scales, None), least)
    assert rows.zeros.abs().max() < torch.finfo(torch.float16).max
    found = (rows.integers.unflatten(1, (2, 32)) - rows.zeros[..., None]) * rows.scales[..., None]
    wide = integers.unflatten(1, (2, 32)) * scales[..., None] - least[..., None]
    torch.testing.assert_close(found, wide, atol=2e-6, rtol=0)


needs_panels = pytest.mark.skipif(
    not has_grouped_panels(GroupedShape(32, 32, 8, 32), torch.bfloat16),
    reason="this processor has no products of whole numbers",
)


@needs_panels
def test_a_tied_table_multiplies_in_its_blocks_and_finds_greedy_tokens_by_its_numbers(tmp_path):
    source, plain = write_model(tmp_path / "a.gguf", q4_k_m)
    model = make_runner(source, dtype="bfloat16").model
    table = plain["token_embd.weight"]
    assert set(model.vocabulary_copies) == {"quantized", "in int8"}
    assert model.vocabulary_copies["quantized"] < 1.2 * table.size
    hidden = torch.randn(9, 256).bfloat16()
    exact = hidden.double() @ torch.from_numpy(table).bfloat16().double().T
    assert torch.equal(model.lm_head.argmax(hidden), exact.argmax(-1))
    assert (model.lm_head(hidden) - exact).std() < 0.02 * exact.std()


@needs_panels
@pytest.mark.parametrize(("kind", "bits"), [("Q4_K", 5.1), ("Q5_K", 6.1), ("Q6_K", 7.1)])
def test_blocks_keep_their_bits_on_a_processor(kind, bits):
    placement = Placement(
        torch.bfloat16,
        torch.device("cpu"),
        get_linear_method(Quantization("gguf", (everything(GGUF(kind)),))),
    )
    method = placement.method(placement, None)
    written = write_blocks(1024, 1024, kind)
    weights = method.create_weights(Layout([Part("a", 1024)], 1024), has_bias=False)
    for _, shard in weights["qweight"].shards():
        shard.load(written.tensors["qweight"])
    method.after_loading(weights)
    assert method.num_bytes * 8 < bits * 1024 * 1024
    x = torch.randn(64, 1024).bfloat16()
    expected = x.double() @ written.weight.T
    # Of rows in 8 bits, of which a block's scale is that of its largest number.
    error = (method.apply(x) - expected).std() / expected.std()
    assert error < 0.01


def test_a_file_that_ends_too_early_is_refused_by_its_tensor(tmp_path):
    source, _ = write_model(tmp_path / "a.gguf", q4_k_m)
    num_bytes = source.stat().st_size
    source.write_bytes(source.read_bytes()[:-5000])
    with pytest.raises(FatalError) as caught:
        make_runner(source)
    assert caught.value.reason == "CorruptWeights"
    message = caught.value.message
    assert "a.gguf is not a whole GGUF file (tensor blk.1.ffn_down.weight, [512, 256] in" in message
    assert f"it has {num_bytes - 5000:,})" in message
    assert "Download it again" in message


def test_rows_that_are_no_whole_blocks_are_refused_by_their_tensor(tmp_path):
    source, _ = write_model(tmp_path / "a.gguf", lambda name: "ffn_down" in name and "Q4_0")
    # 512 inputs become 500.
    name = b"blk.0.ffn_down.weight" + struct.pack("<I", 2)
    found = source.read_bytes()
    assert found.count(name + struct.pack("<Q", 512)) == 1
    source.write_bytes(found.replace(name + struct.pack("<Q", 512), name + struct.pack("<Q", 500)))
    with pytest.raises(FatalError, match=r"blk.0.ffn_down.weight, \[500, 256\] in blocks of 32"):
        make_runner(source)


def test_a_matrix_of_another_size_is_refused_by_both(tmp_path):
    name = "blk.1.ffn_up.weight"
    rows = write_blocks(480, 256, "Q4_K").tensors["qweight"].numpy()
    source = write_gguf(tmp_path / "a.gguf", "llama", blocks={name: ("Q4_K", rows)}, size=SIZE)
    with pytest.raises(FatalError) as caught:
        make_runner(source)
    assert caught.value.reason == "CorruptWeights"
    expected = "model.layers.1.mlp.up_proj.qweight ([480, 144] instead of [512, 144])"
    assert expected in caught.value.message
