"""What is read of a model's files, and what is said of those that say nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda_operator.checkpoint import (
    CheckpointError,
    Stored,
    Tensors,
    read_checkpoint,
    read_head,
    read_index,
)
from pagoda_operator.testing import LLAMA_8B


def read(**config: Any) -> Any:
    return read_checkpoint({**LLAMA_8B, **config}, Tensors())


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"hidden_size": None}, "hidden_size is None; it must be a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 2**31}, "hidden_size is 2147483648"),
        ({"vocab_size": 10**5000}, "vocab_size is a number without end"),
        ({"vocab_size": "x" * 1000}, "vocab_size is 'xxx"),
        ({"architectures": []}, "architectures is []"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of bfloat16"),
        ({"quantization_config": {"quant_method": "bnb"}}, "quant_method is 'bnb'"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(config: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(**config)
    assert caught.value.reason == "InvalidModelConfig"
    assert what in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("config", [None, [], "text", 3])
def test_a_config_that_is_no_object_is_refused(config: object) -> None:
    with pytest.raises(CheckpointError, match="must contain a JSON object"):
        read_checkpoint(config, Tensors())


def test_a_file_without_a_dtype_has_that_of_its_tensors() -> None:
    config = {key: value for key, value in LLAMA_8B.items() if key != "dtype"}
    assert read_checkpoint(config, Tensors(100, "float32")).dtype == "float32"
    assert read_checkpoint(config, Tensors()).dtype == "bfloat16"


def test_groups_of_modules_stored_otherwise_say_nothing_of_the_rest() -> None:
    groups = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert read(quantization_config=groups).quantization == Stored("gptq", (128,))
    skipping = {**groups, "modules_to_not_convert": ["down_proj"]}
    assert read(quantization_config=skipping).quantization == Stored("gptq")
    whole_rows = {**groups, "group_size": -1}
    assert read(quantization_config=whole_rows).quantization == Stored("gptq")


@pytest.mark.parametrize("index", [None, [], {}, {"metadata": []}, {"metadata": {"total_size": 0}}])
def test_an_index_that_names_no_size_is_taken_as_it_is(index: object) -> None:
    assert read_index(index) == Tensors(None)


def test_the_head_of_a_file_adds_up_its_tensors_and_names_the_commonest_float() -> None:
    head = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F16", "shape": [4, 4], "data_offsets": [0, 32]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [32, 36]},
        "c": {"dtype": "I32", "shape": [100], "data_offsets": [36, 436]},
        "broken": {"dtype": "F16", "data_offsets": ["x"]},
    }
    assert read_head(head) == Tensors(436, "float16")
    assert read_head([]) == Tensors()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [*LLAMA_8B, "head_dim", "torch_dtype", "rope_scaling", "rope_parameters", "quantization_config"]
)


@settings(max_examples=200)
@given(st.dictionaries(KEYS, ANYTHING, max_size=3))
def test_whatever_stands_in_a_config_it_is_read_or_refused(changed: dict[str, Any]) -> None:
    try:
        read(**changed)
    except CheckpointError as error:
        refusal = error
    else:
        return
    assert refusal.reason in ("InvalidModelConfig", "UnsupportedArchitecture")
    assert len(str(refusal)) < 600


@settings(max_examples=200)
@given(
    ANYTHING
    | st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries({"dtype": ANYTHING, "data_offsets": st.lists(ANYTHING, max_size=3)}),
        max_size=3,
    )
)
def test_whatever_stands_in_a_head_or_an_index_is_a_size_or_none(found: Any) -> None:
    for tensors in (read_head(found), read_index(found), read_index({"metadata": found})):
        assert tensors.num_bytes is None or tensors.num_bytes > 0
