from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.execution.testing import generate, transformers_tokens
from pagoda_runtime.models.registry import load_model_config, make_model
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.models.weights import load_weights
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.unquantized import UnquantizedLinear

PROMPTS = [[5, 9, 100, 7, 42]]


def run(folder):
    config = EngineConfig(
        model=str(folder), dtype="float32", num_threads=1, kv_cache_memory_bytes=1 << 22
    )
    return generate(ModelRunner(config), PROMPTS, 8)


def corrupt(folder):
    with pytest.raises(FatalError) as caught:
        run(folder)
    assert caught.value.reason == "CorruptWeights"
    return caught.value.message


@pytest.fixture
def llama(tmp_path):
    return make_tiny_checkpoint(tmp_path)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def test_several_files_with_an_index_give_the_same_model(tmp_path):
    whole = make_tiny_checkpoint(tmp_path / "whole")
    parts = make_tiny_checkpoint(tmp_path / "parts", max_shard_size="100KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    assert run(parts) == run(whole)


def test_progress_rises_to_100_percent(llama):
    seen = []
    placement = Placement(torch.float32, torch.device("cpu"), UnquantizedLinear)
    shards = make_model(load_model_config(llama), placement).weights()
    assert set(shards) == set(load_file(llama / "model.safetensors"))
    load_weights(shards, llama, on_progress=lambda *report: seen.append(report))
    percents = [percent for _, percent, _ in seen]
    assert percents == sorted(percents)
    assert 95.0 < percents[-1] <= 100.0
    assert all(phase == "load" and speed > 0 for phase, _, speed in seen)


def test_one_message_lists_all_that_does_not_fit(llama):
    def change(tensors):
        del tensors["model.layers.0.self_attn.k_proj.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)
        for index in range(6):
            tensors[f"extra.{index}"] = torch.zeros(1)

    edit(llama, change)
    message = corrupt(llama)
    assert "1 missing: model.layers.0.self_attn.k_proj.weight" in message
    assert "model.layers.1.mlp.up_proj.weight ([3, 64] instead of [96, 64])" in message
    assert "6 unexpected: extra.0, extra.1, extra.2, extra.3 and 2 more" in message


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = make_tiny_checkpoint(tmp_path, max_shard_size="100KB")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors, others = load_file(first), load_file(second)
    name = next(iter(tensors))
    save_file({**others, name: tensors[name]}, second, {"format": "pt"})
    assert f"1 twice: {name}" in corrupt(folder)


def test_known_leftovers_are_ignored(llama):
    expected = run(llama)
    edit(llama, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert run(llama) == expected


def test_scales_of_keys_and_values_are_told_and_not_used(llama, caplog):
    expected = run(llama)
    layer = "model.layers.0.self_attn"
    names = [f"{layer}.k_scale", f"{layer}.v_scale", f"{layer}.k_proj.k_scale"]
    edit(llama, lambda tensors: tensors.update({name: torch.ones(1) for name in names}))
    with caplog.at_level(logging.INFO):
        assert run(llama) == expected
    assert "3 scales of keys and values in the checkpoint" in caplog.text


def test_a_truncated_file_is_named(llama):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert str(path) in corrupt(llama)


def test_garbage_is_named(llama):
    path = llama / "model.safetensors"
    path.write_bytes(b"not a tensor" * 100)
    assert str(path) in corrupt(llama)


def test_a_file_that_the_index_names_must_exist(tmp_path):
    folder = make_tiny_checkpoint(tmp_path, max_shard_size="100KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    assert str(lost) in corrupt(folder)


def test_a_folder_without_weights_is_not_found(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(FatalError, match=r"neither model\.safetensors") as caught:
        run(llama)
    assert caught.value.reason == "ModelNotFound"


def test_weights_that_cannot_be_opened_are_access_denied(llama):
    path = llama / "model.safetensors"
    path.unlink()
    path.mkdir()
    with pytest.raises(FatalError, match=r"model\.safetensors cannot be read") as caught:
        run(llama)
    assert caught.value.reason == "ModelAccessDenied"


def test_a_head_that_differs_from_the_table_it_is_said_to_be_tied_to_is_used(tmp_path, caplog):
    folder = make_tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    tied = run(folder)
    edit(folder, lambda t: t.update({"lm_head.weight": torch.randn(320, 64) * 0.15}))
    with caplog.at_level(logging.WARNING):
        own = run(folder)
    assert own == transformers_tokens(folder, PROMPTS, 8)
    assert own != tied
    assert "lm_head.weight" in caplog.text
    assert "Set tie_word_embeddings to false" in caplog.text


def test_a_head_that_equals_the_table_stays_tied(tmp_path, caplog):
    folder = make_tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    tied = run(folder)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    with caplog.at_level(logging.WARNING):
        assert run(folder) == tied
    assert "tie_word_embeddings" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_a_dtype_in_the_config_the_weights_own_is_taken(llama, dtype):
    config = json.loads((llama / "config.json").read_text())
    del config["dtype"]
    (llama / "config.json").write_text(json.dumps(config))
    edit(llama, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    runner = ModelRunner(
        EngineConfig(model=str(llama), num_threads=1, kv_cache_memory_bytes=1 << 22)
    )
    assert runner.model.placement.dtype == runner.model.embed_tokens.table.dtype == dtype
