"""Steps of poolers on a GPU that is not there: `make gpu-rehearse`."""

from __future__ import annotations

import json

import pytest
import torch

from pagoda_kernels.launch import LaunchRecorder
from pagoda_runtime.execution.pooling_runner import PoolingSteps
from pagoda_runtime.execution.rehearsal import GPU
from pagoda_runtime.execution.testing import Watch
from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.models.registry import load_model_config, make_model
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.unquantized import UnquantizedLinear
from pagoda_runtime.sampling_params import SamplingParams

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
GEMMA = {"head_dim": 32, "num_key_value_heads": 2, "sliding_window": 8}
MODELS = {
    "BertModel": {},
    "XLMRobertaForSequenceClassification": {"id2label": {"0": "good"}},
    "ModernBertModel": {"local_attention": 8},
    "ModernBertForSequenceClassification": {"classifier_pooling": "mean"},
    "Gemma3TextModel": {**GEMMA, "use_bidirectional_attention": True},
    "Qwen3Model": {"head_dim": 32, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["padded", "deterministic"])
@pytest.mark.parametrize("architecture", MODELS)
def test_a_step_waits_for_nothing_and_sends_little(architecture, is_deterministic, tmp_path):
    values = {**SHAPE, **MODELS[architecture], "architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_model_config(tmp_path)
    rows = [
        ScheduledRow(
            request_id=str(number),
            token_ids=[5] * count,
            start=0,
            block_table=[],
            sampling_params=SamplingParams(),
        )
        for number, count in enumerate((40, 1, 17, 20))
    ]
    with LaunchRecorder(), torch.no_grad():
        model = make_model(config, Placement(torch.bfloat16, GPU, UnquantizedLinear))
        model.after_loading()
        steps = PoolingSteps(model, is_deterministic=is_deterministic)
        with Watch() as watch:
            steps.submit(rows)
    # The rows' numbers; and where the texts of each group of about one length lie.
    assert watch.num_sent == (1 if is_deterministic else 2)
    assert watch.num_fetched == 1
