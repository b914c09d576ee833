"""The programs that are compared: each generates greedily from token ids."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pagoda_runtime import LLM, SamplingParams

Side = Callable[[Sequence[list[int]], int], int]
"""(prompts of equal length, tokens to generate for each) → tokens that came out."""

# The offline engine and the server's: enough for every benchmark here, and the same for both.
KV_CACHE_BYTES = 1 << 30


def make_prompts(
    num_prompts: int, num_tokens: int, vocab_size: int, *seed: object
) -> list[list[int]]:
    """Random tokens: the speed does not depend on what they say, and any model can be measured."""
    rng = random.Random(repr(seed))
    return [rng.choices(range(100, vocab_size), k=num_tokens) for _ in range(num_prompts)]


def timed(side: Side, prompts: Sequence[list[int]], max_tokens: int) -> float:
    """Seconds until all tokens are there."""
    started = time.perf_counter()
    num_tokens = side(prompts, max_tokens)
    seconds = time.perf_counter() - started
    assert num_tokens == len(prompts) * max_tokens, num_tokens
    return seconds


def pagoda_side(llm: LLM) -> Side:
    """The offline class."""

    def generate(prompts: Sequence[list[int]], max_tokens: int) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def load_transformers(folder: Path) -> Any:
    """transformers' model, with its fastest attention on a CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    )


def generate_side(model: Any) -> Side:
    """transformers' generate."""

    def generate(prompts: Sequence[list[int]], max_tokens: int) -> int:
        ids = torch.tensor(prompts)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return int(output[:, ids.shape[1] :].numel())

    return generate


@contextlib.contextmanager
def continuous_batching_side(model: Any) -> Iterator[Side]:
    """transformers' continuous batching, started once.

    Of what was tried on a CPU (sdpa and eager attention; pages of 32 to 256 tokens; 16, 256 and
    default tokens per batch; with and without sharing of blocks) this is the fastest.
    """
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    # An end token that no vocabulary has.
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(page_size=32, num_blocks=256, max_batch_tokens=256)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings, block=True, timeout=10
    ) as manager:

        def generate(prompts: Sequence[list[int]], max_tokens: int) -> int:
            manager.add_requests(inputs=list(prompts), max_new_tokens=max_tokens)
            num_finished = num_tokens = 0
            while num_finished < len(prompts):
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    num_finished += 1
                    num_tokens += len(output.generated_tokens)
                elif output is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended by itself")
            return num_tokens

        yield generate
