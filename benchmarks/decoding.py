"""The engine's core in this process, with requests that all decode."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sides import make_prompts

from pagoda_runtime import SamplingParams
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.engine.process import make_core
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.ipc.messages import EngineRequest

NUM_REQUESTS = 16
PROMPT_TOKENS = 64


def load_core(folder: Path, **flags: Any) -> tuple[EngineCore, ModelRunner]:
    """flags: others of EngineConfig."""
    config = EngineConfig(
        model=str(folder), dtype="bfloat16", max_model_len=1024, max_num_seqs=NUM_REQUESTS, **flags
    )
    runner = ModelRunner(config)
    return make_core(config, runner), runner


def begin_decoding(core: EngineCore, params: Sequence[SamplingParams], *seed: object) -> None:
    """Step until a request for each of the parameters has a few tokens."""
    vocab_size = core.runner.ready_facts.vocab_size
    prompts = make_prompts(len(params), PROMPT_TOKENS, vocab_size, *seed)
    for number, (prompt, some) in enumerate(zip(prompts, params, strict=True)):
        request = EngineRequest(
            request_id=str(number),
            prompt_token_ids=prompt,
            sampling_params=some,
            arrival_seconds=time.time(),
        )
        core.add(request)
    running = core.scheduler.running
    while len(running) < len(params) or any(s.num_output_tokens < 8 for s in running):
        core.step(time.time())
