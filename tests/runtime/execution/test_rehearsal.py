"""Steps on a GPU that is not there: `make gpu-rehearse`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pagoda_kernels.launch import LaunchRecorder
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.profiling import largest_steps
from pagoda_runtime.execution.rehearsal import absent_runner
from pagoda_runtime.execution.testing import Watch, rehearse
from pagoda_runtime.ipc.messages import BlockCopy, ScheduledRow
from pagoda_runtime.layers.rope_config import RopeConfig
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.sampling_params import SamplingParams

# Layers repeat, so two are as good as 32.
LLAMA_3_1_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    names={},
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=2,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    max_position_embeddings=131072,
    activation="silu",
    tie_word_embeddings=False,
    rope=(RopeConfig(500_000.0),) * 2,
    sliding_windows=(0,) * 2,
)
TINY_GEMMA_3 = replace(
    LLAMA_3_1_8B,
    architecture="Gemma3ForCausalLM",
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=1,
    head_dim=32,
    activation="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    rope=(RopeConfig(10_000.0), RopeConfig(1_000_000.0)),
    sliding_windows=(64, 0),
    qk_norm=True,
    sandwich_norms=True,
)
TINY_QWEN_3 = replace(
    TINY_GEMMA_3,
    architecture="Qwen3ForCausalLM",
    num_kv_heads=2,
    activation="silu",
    tie_word_embeddings=False,
    rope=(RopeConfig(10_000.0),) * 2,
    sliding_windows=(0, 0),
    sandwich_norms=False,
)
MODELS = {"Llama 3.1 8B": LLAMA_3_1_8B, "Gemma 3": TINY_GEMMA_3, "Qwen 3": TINY_QWEN_3}
GREEDY = SamplingParams(temperature=0.0)


def make_row(
    number: int,
    *,
    start: int,
    num_tokens: int = 1,
    params: SamplingParams | None = GREEDY,
    **fields,
) -> ScheduledRow:
    num_blocks = -(-(start + num_tokens) // 16)
    return ScheduledRow(
        request_id=f"r{number}",
        token_ids=[5] * num_tokens,
        start=start,
        block_table=[1 + number * 64 + block for block in range(num_blocks)],
        sampling_params=params,
        **fields,
    )


def decode_rows(count: int) -> list[ScheduledRow]:
    """Each with a token that the step before is still computing, but for the first."""
    return [
        make_row(number, start=500 + number, row_in_flight=number or None)
        for number in range(count)
    ]


def mixed_rows(num_prompt_tokens: int = 900) -> list[ScheduledRow]:
    """A prompt, a part of one, and rows that decode."""
    return [
        make_row(90, start=0, num_tokens=num_prompt_tokens),
        make_row(91, start=100, num_tokens=200, params=None),
        *decode_rows(5),
    ]


@pytest.fixture(params=MODELS)
def model(request) -> ModelConfig:
    return MODELS[request.param]


def watch(
    config: ModelConfig, *steps: list[ScheduledRow], is_recorded: bool = False, **flags: object
) -> list[Watch]:
    """What the host and the device exchange in each step."""
    watches = []
    with absent_runner(config, max_num_seqs=24, **flags) as (runner, _):
        if is_recorded:
            runner.record_graphs()
        for rows in steps:
            with Watch() as one:
                runner.submit(rows)
            watches.append(one)
    return watches


@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_decode_step_sends_rows_and_what_they_want_and_fetches_tokens(model, is_recorded):
    drawn = SamplingParams(temperature=0.7, top_p=0.9, top_k=50, logprobs=2)
    among_drawn = [*decode_rows(4), make_row(4, start=40, params=drawn)]
    masked = make_row(5, start=40, params=SamplingParams(grammar=""), mask=bytes(4 * 65536))
    steps = (decode_rows(3), decode_rows(20), among_drawn, [*among_drawn, masked])
    for one in watch(model, *steps, is_recorded=is_recorded):
        assert (one.num_sent, one.num_fetched) == (2, 1)


def test_with_deterministic_nothing_waits_either(model):
    decode, mixed = watch(model, decode_rows(20), mixed_rows(), deterministic=True)
    assert decode.num_fetched == mixed.num_fetched == 1


def test_a_mixed_step_waits_for_nothing(model):
    prompt = make_row(80, start=0, num_tokens=70, prompt_targets=[5] * 69, num_prompt_logprobs=3)
    plain, with_logprobs = watch(model, mixed_rows(), [*mixed_rows(), prompt])
    assert plain.num_fetched == 1
    # The prompt's logprobs come in two pieces.
    assert with_logprobs.num_fetched == 3


def test_the_largest_steps_wait_for_nothing(model):
    config = EngineConfig(model="", max_num_batched_tokens=2048, max_num_seqs=24)
    prompts, contexts = watch(model, *largest_steps(config, 16, 8192))
    # Of 2025 tokens the logprobs come in 32 pieces.
    assert prompts.num_fetched == 1 + 32
    assert contexts.num_fetched == 1


def test_blocks_are_copied_without_a_wait(model):
    with absent_runner(model) as (runner, _), Watch() as watch:
        runner.submit(decode_rows(2), [BlockCopy(3, 4), BlockCopy(4, 5)])
    assert watch.num_fetched == 1


def test_a_longer_prompt_costs_no_more_python():
    def count(num_prompt_tokens: int) -> int:
        with absent_runner(MODELS["Qwen 3"]) as (runner, _):
            # What torch learns of new shapes is not of interest.
            for _ in range(3):
                calls = count_calls(lambda: runner.submit(mixed_rows(num_prompt_tokens)))
        return calls

    assert abs(count(2000) - count(300)) < 100


def count_calls(function: Callable[[], object]) -> int:
    """Of Python functions."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_the_launches_of_steps_are_told_in_their_order():
    launches = rehearse(MODELS["Qwen 3"], [decode_rows(2), mixed_rows()], block_size=32)
    tokens = [
        launch.args[0].shape[0]
        for launch in launches
        if launch.kernel.__name__ == "_add_and_norm_kernel"
    ]
    # All tokens of a step, and at its end those that are sampled.
    assert list(dict.fromkeys(tokens)) == [2, 900 + 200 + 5, 6]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: torch.zeros(8).copy_(x),
        lambda x: torch.zeros(8).to(x.device),
        lambda x: x.copy_(torch.zeros(8)),
        lambda x: x[torch.zeros(8, dtype=torch.int64)],
    ],
)
def test_the_watch_lets_no_wait_pass(wait):
    with LaunchRecorder(), torch.inference_mode(), Watch():
        x = torch.zeros(8, device="cuda")
        with pytest.raises(AssertionError):
            wait(x)
