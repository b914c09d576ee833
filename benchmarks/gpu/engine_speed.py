"""How fast an engine is ready, decodes, and serves many requests; and transformers beside it."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sides import make_prompts

from gpu.scale import Scale
from pagoda_runtime import LLM, SamplingParams

Request = tuple[list[int], int]
"""A prompt, and how many tokens are wanted."""


def measure_engine(
    folder: Path, scale: Scale, wanted: Collection[str], **flags: Any
) -> dict[str, Any]:
    """Seconds to ready, tokens/s of one request, and the tokens of a few requests.

    Args:
        wanted: "depths": milliseconds between tokens by depth; "requests": output tokens/s of many.
        flags: of the engine.
    """
    started = time.perf_counter()
    settings = {"dtype": "bfloat16", "max_model_len": scale.max_model_len, **scale.flags, **flags}
    with LLM(str(folder), **settings) as llm:
        figures: dict[str, Any] = {"ready_seconds": time.perf_counter() - started}
        vocab_size = llm.facts.vocab_size
        some = make_prompts(16, 16, vocab_size, "tokens")
        most = scale.output_tokens[1]
        # Of 1 and of 16 rows, as graphs have.
        figures["tokens"] = [
            tokens for prompts in (some[:1], some) for tokens in _generate(llm, prompts, most)
        ]
        figures["decode_1"] = 1000 / _milliseconds_between(llm, some[:1], scale)
        if "depths" in wanted:
            for name, context in zip(("short", "long"), scale.itl_contexts, strict=True):
                prompts = make_prompts(scale.itl_seqs, context, vocab_size, "itl", context)
                figures[f"itl_{name}_ms"] = _milliseconds_between(llm, prompts, scale)
        if "requests" in wanted:
            figures["output_tokens_per_second"] = _serve(llm, make_requests(scale, vocab_size))
    return figures


def make_requests(scale: Scale, vocab_size: int) -> list[Request]:
    """Lengths are drawn evenly."""
    rng = random.Random(0)
    least, most = scale.request_tokens
    return [
        (make_prompts(1, rng.randint(least, most), vocab_size, number)[0], rng.randint(least, most))
        for number in range(scale.num_requests)
    ]


def _serve(llm: LLM, requests: Sequence[Request]) -> float:
    started = time.perf_counter()
    _run(llm, *zip(*requests, strict=True))
    return sum(wanted for _, wanted in requests) / (time.perf_counter() - started)


def _milliseconds_between(llm: LLM, prompts: Sequence[list[int]], scale: Scale) -> float:
    """Of a decode step: what more steps take more, with the prompts in the prefix cache.

    The median of three: where a run is the first of its kind, a GPU's libraries load more.
    """
    _generate(llm, prompts, 1)
    fewer, more = scale.output_tokens
    found = []
    for _ in range(3):
        short, long = (_seconds_of(llm, prompts, num_tokens) for num_tokens in (fewer, more))
        found.append(1000 * (long - short) / (more - fewer))
    return median(found)


def _seconds_of(llm: LLM, prompts: Sequence[list[int]], num_tokens: int) -> float:
    started = time.perf_counter()
    _generate(llm, prompts, num_tokens)
    return time.perf_counter() - started


def _generate(llm: LLM, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    return _run(llm, prompts, [num_tokens] * len(prompts))


def _run(llm: LLM, prompts: Iterable[list[int]], wanted: Iterable[int]) -> list[list[int]]:
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in wanted]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def measure_generate(folder: Path, scale: Scale, device: torch.device) -> dict[str, Any]:
    """Output tokens/s that the requests of a batch want, of transformers' `generate`.

    It stops after some time, at which fewer requests have ended than do later: in its favour.
    """
    model = _load(folder, scale, device)
    requests = make_requests(scale, model.config.vocab_size)[: scale.static_batch]
    longest = max(len(prompt) for prompt, _ in requests)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in requests])
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in requests]
    )
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), **settings}
    model.generate(**inputs, max_new_tokens=2)
    started = time.perf_counter()
    most = max(wanted for _, wanted in requests)
    result = model.generate(**inputs, max_new_tokens=most, max_time=scale.generate_seconds).cpu()
    seconds = time.perf_counter() - started
    num_steps = result.shape[1] - longest
    num_tokens = sum(min(wanted, num_steps) for _, wanted in requests)
    return {"tokens_per_second": num_tokens / seconds, "num_steps": num_steps}


def measure_batching(folder: Path, scale: Scale, device: torch.device) -> dict[str, Any]:
    """Output tokens/s of transformers' continuous batching, of the requests done in time."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = _load(folder, scale, device)
    requests = make_requests(scale, model.config.vocab_size)
    # An end token that no vocabulary has.
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(**scale.batching),
        block=True,
        timeout=10,
    ) as manager:
        started = time.perf_counter()
        for prompt, wanted in requests:
            manager.add_request(prompt, max_new_tokens=wanted)
        num_finished = num_tokens = 0
        is_late = False
        while num_finished < len(requests) and not is_late:
            output = manager.get_result(timeout=1)
            is_late = time.perf_counter() - started > scale.batching_seconds
            if output is not None and output.is_finished():
                num_finished += 1
                num_tokens += len(output.generated_tokens)
            elif output is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended by itself")
        seconds = time.perf_counter() - started
    return {"tokens_per_second": num_tokens / seconds, "num_finished": num_finished}


def _load(folder: Path, scale: Scale, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=scale.dtype, attn_implementation="sdpa"
    ).to(device)
