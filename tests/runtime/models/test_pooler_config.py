"""What a checkpoint is for, as its files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.registry import load_model_config

BERT = {
    "architectures": ["BertModel"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA = {**BERT, "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2}
MODULES = ("Transformer", "Pooling", "Normalize")


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def write_modules(folder: Path, pooling: dict[str, object], kinds=MODULES) -> Path:
    """sentence-transformers' files of a BERT."""
    modules = [
        {"idx": index, "path": f"{index}_{kind}" if index else "", "type": f"a.b.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    return write(folder, config=BERT, modules=modules, **{"1_Pooling/config": pooling})


def pooler_of(folder: Path):
    pooler = load_model_config(folder).pooler
    assert pooler is not None
    return pooler


def test_a_bare_encoder_embeds_by_means_of_length_1(tmp_path):
    pooler = pooler_of(write(tmp_path, config=BERT))
    assert (pooler.pooling, pooler.facts.task, pooler.facts.size) == ("mean", "embed", 64)
    assert pooler.facts.is_normalized


def test_a_bare_decoder_embeds_by_the_last_token(tmp_path):
    config = load_model_config(write(tmp_path, config={**LLAMA, "architectures": ["LlamaModel"]}))
    assert config.pooler is not None
    assert (config.pooler.pooling, config.is_causal) == ("last", True)


def test_a_causal_model_generates_unless_modules_say_otherwise(tmp_path):
    assert load_model_config(write(tmp_path, config=LLAMA)).pooler is None
    write_modules(tmp_path, {"pooling_mode_lasttoken": True}, MODULES[:2])
    pooler = pooler_of(write(tmp_path, config=LLAMA))
    assert (pooler.pooling, pooler.facts.is_normalized) == ("last", False)


@pytest.mark.parametrize(
    "settings", [{"pooling_mode_cls_token": True}, {"pooling_mode": "cls"}], ids=["old", "new"]
)
def test_pooling_is_that_of_its_module(settings, tmp_path):
    pooler = pooler_of(write_modules(tmp_path, settings))
    assert (pooler.pooling, pooler.facts.is_normalized) == ("cls", True)


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": "weightedmean"},
        {"pooling_mode": "mean", "include_prompt": False},
    ],
)
def test_pooling_that_is_not_computed_is_refused(settings, tmp_path):
    with pytest.raises(FatalError, match=r"1_Pooling/config.json: (pooling_mode|include_prompt)"):
        load_model_config(write_modules(tmp_path, settings))


def test_a_module_that_is_not_computed_is_refused_by_name(tmp_path):
    folder = write_modules(tmp_path, {"pooling_mode": "mean"}, ("Transformer", "Pooling", "LSTM"))
    with pytest.raises(FatalError, match="has a module 'LSTM'"):
        load_model_config(folder)


@pytest.mark.parametrize("content", [{"a": 1}, [{"idx": 0}], [7]])
def test_modules_of_another_form_are_refused(content, tmp_path):
    with pytest.raises(FatalError, match="no list of modules"):
        load_model_config(write(tmp_path, config=BERT, modules=content))


def test_a_context_ends_where_sentence_transformers_cuts(tmp_path):
    write(tmp_path, config=BERT, sentence_bert_config={"max_seq_length": 128})
    assert load_model_config(tmp_path).max_position_embeddings == 128


def test_positions_of_roberta_begin_behind_the_padding_token(tmp_path):
    roberta = {**BERT, "architectures": ["XLMRobertaModel"], "max_position_embeddings": 514}
    config = load_model_config(write(tmp_path, config={**roberta, "pad_token_id": 1}))
    assert config.max_position_embeddings == 512
    assert config.learned_positions is not None
    assert config.learned_positions.first == 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"is_matryoshka": True}, []),
        ({"matryoshka_dimensions": [32, 16]}, [32, 16]),
    ],
)
def test_a_config_says_what_vectors_may_be_cut_to(settings, expected, tmp_path):
    pooler = pooler_of(write(tmp_path, config={**BERT, **settings}))
    assert pooler.facts.dimensions == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "softmax"),
        ({"id2label": {"0": "good"}}, "sigmoid"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "regression"}, "identity"),
        ({"id2label": {"0": "good"}, "problem_type": "regression"}, "sigmoid"),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            "identity",
        ),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"}, "tanh"),
    ],
)
def test_a_config_says_what_logits_mean(settings, expected, tmp_path):
    config = {**BERT, "architectures": ["BertForSequenceClassification"], **settings}
    pooler = pooler_of(write(tmp_path, config=config))
    assert (pooler.facts.task, pooler.facts.activation) == ("classify", expected)
    assert pooler.facts.labels[0] == ("good" if "id2label" in settings else "LABEL_0")


def test_a_default_prompt_that_is_none_of_the_prompts_is_refused(tmp_path):
    settings = {"prompts": {"query": "q: "}, "default_prompt_name": "other"}
    write(tmp_path, config=BERT, config_sentence_transformers=settings)
    with pytest.raises(FatalError, match="default_prompt_name is 'other'"):
        load_model_config(tmp_path)


def test_a_decoder_that_attends_in_both_directions_does_not_generate(tmp_path):
    gemma = {
        **LLAMA,
        "architectures": ["Gemma3ForCausalLM"],
        "use_bidirectional_attention": True,
        "head_dim": 16,
    }
    with pytest.raises(FatalError, match="use_bidirectional_attention"):
        load_model_config(write(tmp_path, config=gemma))
