"""The steps of a GPU, run on a CPU: tokens stay on the device, decode steps are replayed."""

from __future__ import annotations

import random

import pytest

from pagoda_kernels.paged_attention.reference import ReferenceAttention
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.execution.decode_steps import graph_sizes
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.execution.testing import CpuAsDevice, generate
from pagoda_runtime.ipc.messages import EngineRequest, RequestDelta
from pagoda_runtime.models.testing import make_tiny_checkpoint
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.testing import make_scheduler_config

# A family, and the dtype of its keys and values.
MODELS = [
    *((family, "auto") for family in ("llama", "gemma3_text", "mistral")),
    ("llama", "fp8_e4m3"),
    ("mistral", "int8"),
]
MAX_NUM_SEQS = 16
KINDS = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0, "seed": 3},
    "truncated": {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "seed": 4},
    "with logprobs": {"temperature": 0.0, "logprobs": 3},
    "with those of the prompt": {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
    "penalized": {"temperature": 0.0, "presence_penalty": 1.0, "repetition_penalty": 1.2},
    "of three choices": {"temperature": 1.0, "n": 3, "seed": 5},
    "of beams": {"temperature": 0.0, "n": 2, "use_beam_search": True},
}


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def runners(request, tmp_path_factory) -> tuple[ModelRunner, ModelRunner]:
    """On a CPU, and on one that is treated as a GPU."""
    family, kv_cache_dtype = request.param
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp(family), family)
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        num_threads=1,
        block_size=8,
        max_model_len=128,
        max_num_seqs=MAX_NUM_SEQS,
        kv_cache_memory_bytes=8 * 2**20,
        kv_cache_dtype=kv_cache_dtype,
    )
    device = ModelRunner(config, platform=CpuAsDevice(), backend=ReferenceAttention)
    return ModelRunner(config), device


def run(
    runner: ModelRunner, requests: list[EngineRequest], *, overlap: bool, **limits: int
) -> dict[tuple[str, int], list[RequestDelta]]:
    """The deltas of each choice."""
    config = make_scheduler_config(
        runner.ready_facts,
        **{
            "max_num_seqs": MAX_NUM_SEQS,
            "max_num_batched_tokens": 48,
            "eos_token_ids": [2],
            **limits,
        },
    )
    core = EngineCore(runner, config, overlap=overlap)
    for request in requests:
        core.add(request)
    found: dict[tuple[str, int], list[RequestDelta]] = {}
    while core.has_work:
        output = core.step(0.0)
        core.check()
        for delta in output.deltas:
            found.setdefault((delta.request_id, delta.index), []).append(delta)
    if "num_blocks" in limits:
        assert output.stats.preemptions_total or runner.ready_facts.sliding_window
    return found


def make_requests(kinds: list[dict]) -> list[EngineRequest]:
    """Prompts of 3 to 50 tokens, some of which begin alike."""
    random_ = random.Random(0)
    shared = random_.choices(range(3, 300), k=17)
    return [
        EngineRequest(
            request_id=f"r{number}",
            prompt_token_ids=(shared if number % 2 else [])
            + random_.choices(range(3, 300), k=random_.randint(3, 30)),
            sampling_params=SamplingParams(max_tokens=14 + number % 5, ignore_eos=True, **kind),
            arrival_seconds=0.0,
        )
        for number, kind in enumerate(kinds)
    ]


def verify_as_alone(found, cpu: ModelRunner, requests: list[EngineRequest]) -> None:
    """Equal to what each request gets alone on a CPU."""
    expected: dict[tuple[str, int], list[RequestDelta]] = {}
    for request in requests:
        expected |= run(cpu, [request], overlap=False)
    # A number of 8 bits that lies between two may be rounded to the other one, which moves a
    # token that was drawn at the border between two.
    is_exact = cpu.ready_facts.kv_cache_dtype == "float32"
    tolerance = 1e-4 if is_exact else 2e-2
    assert found.keys() == expected.keys()
    moved = [
        choice for choice, deltas in found.items() if tokens(deltas) != tokens(expected[choice])
    ]
    assert len(moved) <= (0 if is_exact else len(found) // 10), moved
    for choice in found.keys() - moved:
        for delta, other in zip(found[choice], expected[choice], strict=True):
            for name in ("logprobs", "prompt_logprobs"):
                entries, wanted = getattr(delta, name) or [], getattr(other, name) or []
                assert [entry.token_id for entry in entries] == [e.token_id for e in wanted]
                assert [entry.logprob for entry in entries] == pytest.approx(
                    [entry.logprob for entry in wanted], abs=tolerance
                )


def tokens(deltas: list[RequestDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.new_token_ids]


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_of_all_kinds_get_the_tokens_that_each_gets_alone(runners, overlap):
    cpu, device = runners
    requests = make_requests([*KINDS.values(), *KINDS.values()])
    before = device.platform.num_replays
    found = run(device, requests, overlap=overlap)
    assert device.platform.num_replays > before + 5
    verify_as_alone(found, cpu, requests)


@pytest.mark.parametrize("caching", [False, True])
def test_preemption_and_prefix_hits_change_no_token(runners, caching):
    cpu, device = runners
    kinds = ("greedy", "drawn", "of three choices", "of beams")
    requests = make_requests([KINDS[kind] for kind in kinds] * 3)
    limits = {"num_blocks": 24, "enable_prefix_caching": caching}
    found = run(device, requests, overlap=True, **limits)
    verify_as_alone(found, cpu, requests)


def test_a_step_of_more_rows_than_were_recorded_runs_as_it_is(runners):
    _, device = runners
    steps = device.decode_steps
    prompts = [[3 + number, 40, 200 - number] for number in range(MAX_NUM_SEQS)]
    expected = generate(device, prompts, 12)
    sizes, before = steps._sizes, device.platform.num_replays
    steps._sizes = [1, 2]
    assert generate(device, prompts, 12) == expected
    assert device.platform.num_replays == before
    steps._sizes = sizes


def test_steps_of_few_and_of_many_rows_are_recorded():
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert graph_sizes(256)[:6] == [1, 2, 4, 8, 16, 32]
    assert len(graph_sizes(256)) == 20
    assert graph_sizes(65536)[-1] == 512
