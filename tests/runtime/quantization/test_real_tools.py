"""Tiny checkpoints that independent tools quantized: `make quant-tiny` writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.runner import ModelRunner, no_progress
from pagoda_runtime.execution.testing import generate_with_logits
from pagoda_runtime.parallel import TensorParallel

FOLDER = Path(__file__).parents[2] / "data" / "quantized"
PROMPTS = [[5, 9, 100, 7, 42], list(range(40, 70))]
KINDS = sorted(path.name for path in FOLDER.iterdir())


def test_each_tool_has_its_checkpoints():
    assert {"awq", "gptq", "ct_fp8", "ct_int8", "ct_int4"} <= {*KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_the_weights_that_the_tool_itself_makes(kind):
    """What the tool dequantized has been run by transformers."""
    expected = load_file(FOLDER / kind / "expected.safetensors")["logits"]
    config = EngineConfig(
        model=str(FOLDER / kind), dtype="float32", num_threads=1, kv_cache_memory_bytes=1 << 22
    )
    runner = ModelRunner(config, no_progress, TensorParallel())
    tokens, logits = generate_with_logits(runner, PROMPTS, len(expected))
    assert tokens == expected.argmax(-1).T.tolist()
    # Tools dequantize in 16 bits.
    torch.testing.assert_close(logits, expected, atol=2e-2, rtol=2e-3)
