"""Quantized checkpoints that do not fit what they say of themselves."""

from __future__ import annotations

import pytest
import torch

from pagoda_runtime.errors import FatalError


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name])

    return edit


LAYER = "model.layers.0.mlp.down_proj"
ATTENTION = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    ("kind", "edit", "shown"),
    [
        ("awq", drop(f"{LAYER}.scales"), f"1 missing: {LAYER}.scales"),
        (
            "awq",
            put(f"{LAYER}.qweight", lambda t: t[:, :4]),
            "qweight ([96, 4] instead of [96, 8])",
        ),
        ("awq", put(f"{LAYER}.qweight", lambda t: t[:90]), "qweight ([90, 8] instead of [96, 8])"),
        ("awq", put(f"{LAYER}.qzeros", lambda t: t.long()), "qzeros (int64 instead of int32)"),
        ("gptq", put(f"{LAYER}.g_idx", lambda t: t + 1), "g_idx: it names the groups 1 to 3"),
        ("gptq", drop(f"{LAYER}.g_idx"), f"1 missing: {LAYER}.g_idx"),
        ("gptq", put(f"{LAYER}.scales", lambda t: t[:2]), "scales ([2, 64] instead of [3, 64])"),
        (
            "packed",
            put(f"{LAYER}.weight_shape", lambda t: t.flip(0)),
            "weight_shape: [96, 64]; it must be [64, 96] as in config.json",
        ),
        (
            "packed",
            put(f"{LAYER}.weight_packed", lambda t: t[:, :6]),
            "[64, 6] instead of [64, 12]",
        ),
        (
            "awq",
            put(f"{LAYER}.scales", lambda t: t / 0),
            f"{LAYER}.scales: a scale is infinite, or no number",
        ),
        (
            "gguf",
            put(f"{LAYER}.qweight", lambda t: t | 0x7C),
            f"{LAYER}.qweight: a scale is infinite, or no number",
        ),
        (
            "int8",
            put(f"{LAYER}.weight_scale", lambda t: t[:7]),
            "weight_scale: its shape is [7, 1]; it must be one number, or one for each of 64",
        ),
        (
            "gguf",
            put(f"{LAYER}.qweight", lambda t: t[:, :54]),
            "qweight ([64, 54] instead of [64, 60])",
        ),
        ("int8", put(f"{LAYER}.weight", lambda t: t.float()), "weight (float32 instead of int8)"),
        ("fp8, static", drop(f"{LAYER}.input_scale"), f"missing: {LAYER}.input_scale"),
        (
            "fp8, static",
            put(f"{LAYER}.input_scale", torch.neg),
            f"{LAYER}.input_scale: it is -0.25; it must be one positive number",
        ),
        ("fp8 in blocks", drop(f"{LAYER}.weight_scale_inv"), f"missing: {LAYER}.weight_scale"),
        (
            "exl2",
            put(f"{ATTENTION}.q_groups", lambda t: torch.tensor([5, 0, 7, 5], dtype=torch.int16)),
            f"{ATTENTION}.q_groups: group 1 has 7 bits",
        ),
        (
            "exl2",
            put(f"{ATTENTION}.q_weight", lambda t: t[:-2]),
            f"{ATTENTION}.q_groups: it is of 48 inputs; it must be of the matrix's 64",
        ),
        (
            "exl2",
            put(f"{ATTENTION}.q_invperm", lambda t: t * 0),
            f"{ATTENTION}.q_invperm: it has some places twice",
        ),
        (
            "exl2",
            put(f"{ATTENTION}.q_scale_max", lambda t: t[:1]),
            f"{ATTENTION}.q_scale_max: it has 1 rows",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_tensor_and_both_values(
    rewritten, make_runner, kind, edit, shown
):
    folder = rewritten(kind, tensors=edit)
    with pytest.raises(FatalError) as caught:
        make_runner(folder)
    assert caught.value.reason == "CorruptWeights"
    assert shown in caught.value.message
    assert "Download the model again" in caught.value.message


def test_groups_that_are_in_an_order_have_one(rewritten, make_runner):
    def order(values):
        for part in values["quantization_config"]["config_groups"].values():
            part["weights"]["actorder"] = "group"

    folder = rewritten("packed", config=order)
    with pytest.raises(FatalError, match=r"missing: .*weight_g_idx"):
        make_runner(folder)


def test_groups_that_do_not_divide_the_inputs_are_refused(rewritten, make_runner):
    folder = rewritten("awq", config=lambda v: v["quantization_config"].update(group_size=40))
    with pytest.raises(FatalError) as caught:
        make_runner(folder)
    assert caught.value.reason == "QuantizationMismatch"
    assert "model.layers.0.mlp.gate_proj: its 64 inputs are no multiple" in caught.value.message


@pytest.mark.parametrize(("flag", "is_refused"), [("int8", True), ("fp8", False), ("auto", False)])
def test_a_cache_against_what_the_checkpoint_was_made_for_is_refused(
    rewritten, make_runner, flag, is_refused
):
    scheme = {"num_bits": 8, "type": "float"}
    folder = rewritten(
        "packed", config=lambda v: v["quantization_config"].update(kv_cache_scheme=scheme)
    )
    if not is_refused:
        assert make_runner(folder, kv_cache_dtype=flag).num_blocks
        return
    with pytest.raises(FatalError, match=r"--kv-cache-dtype .* is int8, .* fp8_e4m3") as caught:
        make_runner(folder, kv_cache_dtype=flag)
    assert caught.value.reason == "QuantizationMismatch"
