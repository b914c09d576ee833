"""EngineCore on the fake runner, whose cache shows every wrong block: pagoda_runtime.testing."""

from __future__ import annotations

import random
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.engine.messages import EngineRequest, RowOutput
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.testing import FakeRunner, fake_next_token

VOCAB_SIZE = 3  # So few that prompts share beginnings by chance.
EOS = 0


def make_core(runner: FakeRunner, **overrides: object) -> EngineCore:
    settings_ = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 7,
        "max_num_waiting": 1000,
        "max_model_len": runner.max_model_len,
        "eos_token_ids": [EOS],
        "enable_prefix_caching": True,
        "seed": 0,
    }
    return EngineCore(runner, **{**settings_, **overrides})


def unbatched(request: EngineRequest, max_num_tokens: int) -> tuple[list[int], str]:
    """What the request gives when nothing else is in the world."""
    params, token_ids = request.sampling_params, list(request.prompt_token_ids)
    output: list[int] = []
    while True:
        output.append(fake_next_token(token_ids, params, params.seed or 0, VOCAB_SIZE))
        token_ids.append(output[-1])
        if output[-1] == EOS and not params.ignore_eos:
            return output, "stop"
        if len(output) == params.max_tokens or len(token_ids) >= max_num_tokens:
            return output, "length"


requests_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=14),
        st.integers(1, 12),  # max_tokens
        st.booleans(),  # ignore_eos
        st.booleans(),  # is_greedy
        st.integers(0, 25),  # arrives at step
        st.one_of(st.none(), st.integers(0, 40)),  # aborted at step
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=200, deadline=None)
@given(
    requests=requests_strategy,
    num_blocks=st.integers(5, 20),
    block_size=st.integers(1, 4),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 20),
    enable_prefix_caching=st.booleans(),
)
def test_whatever_arrives_and_leaves_every_output_is_the_unbatched_one(
    requests, num_blocks, block_size, max_num_seqs, max_num_batched_tokens, enable_prefix_caching
):
    runner = FakeRunner(num_blocks=num_blocks, block_size=block_size, vocab_size=VOCAB_SIZE)
    core = make_core(
        runner,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
    )
    capacity = num_blocks * block_size
    expected, outputs, reasons, aborts = {}, {}, {}, {}
    arrivals: dict[int, list[EngineRequest]] = {}
    for i, (prompt, max_tokens, ignore_eos, is_greedy, arrival, abort) in enumerate(requests):
        request = EngineRequest(
            request_id=f"r{i}",
            prompt_token_ids=prompt[: capacity - 1],
            sampling_params=SamplingParams(
                temperature=0.0 if is_greedy else 1.0,
                seed=i,
                max_tokens=max_tokens,
                ignore_eos=ignore_eos,
            ),
            arrival_seconds=0.0,
        )
        arrivals.setdefault(arrival, []).append(request)
        expected[request.request_id] = unbatched(request, min(capacity + 1, runner.max_model_len))
        outputs[request.request_id] = []
        if abort is not None:
            aborts.setdefault(abort, []).append(request.request_id)

    gone = set()
    # Nobody starves: alone, one after the other, and a token at a time, all would be through.
    for now in range(60 + sum(len(p) + 2 * n for p, n, *_ in requests) * len(requests) * 2):
        for request in arrivals.pop(now, []):
            core.add(request)
        gone.update(i for i in aborts.get(now, []) if i in core.scheduler.requests)
        core.abort(aborts.get(now, []))
        for delta in core.step(float(now)).deltas:
            assert delta.request_id not in gone
            outputs[delta.request_id] += delta.new_token_ids
            reasons[delta.request_id] = delta.finish_reason
        core.check()
        if not arrivals and not core.has_work:
            break
    assert not core.has_work
    assert core.scheduler.block_pool.num_used == 0
    for request_id, (tokens, reason) in expected.items():
        if reasons.get(request_id) is not None:
            assert (outputs[request_id], reasons[request_id]) == (tokens, reason)
        else:
            assert request_id in gone
            assert outputs[request_id] == tokens[: len(outputs[request_id])]


def test_preemption_with_shared_prefixes_changes_no_token():
    runner = FakeRunner(num_blocks=16, block_size=2, vocab_size=VOCAB_SIZE)
    core = make_core(runner, max_num_seqs=8, max_num_batched_tokens=32)
    params = SamplingParams(temperature=0.0, max_tokens=15, ignore_eos=True)
    requests = [
        EngineRequest(
            request_id=f"r{i}",
            prompt_token_ids=[1, 1, 2, 2, i % 3],
            sampling_params=params,
            arrival_seconds=0.0,
        )
        for i in range(8)
    ]
    for request in requests:
        core.add(request)
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while core.has_work:
        output = core.step(0.0)
        core.check()
        for delta in output.deltas:
            outputs[delta.request_id] += delta.new_token_ids
    assert output.stats.preemptions_total > 0
    assert output.stats.prefix_cache_hits > 0
    for request in requests:
        assert outputs[request.request_id] == unbatched(request, 33)[0]


def test_the_fake_runner_shows_a_wrong_block_table_in_the_tokens():
    core = make_core(FakeRunner(num_blocks=4, block_size=2, vocab_size=100))
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    for i in range(2):
        core.add(
            EngineRequest(
                request_id=f"r{i}",
                prompt_token_ids=[1 + i, 1],
                sampling_params=params,
                arrival_seconds=0.0,
            )
        )
    core.step(0.0)
    first, second = core.scheduler.running
    first.block_table[0] = second.block_table[0]
    right = [fake_next_token(request.token_ids, params, 0, 100) for request in (first, second)]
    tokens = [delta.new_token_ids[0] for delta in core.step(0.0).deltas]
    assert tokens[0] != right[0]
    assert tokens[1] == right[1]


def test_the_fake_runner_refuses_to_read_what_another_request_wrote():
    core = make_core(FakeRunner(num_blocks=8, block_size=2, vocab_size=100))
    for i in range(2):
        core.add(
            EngineRequest(
                request_id=f"r{i}",
                prompt_token_ids=[1 + i, 1, 1],
                sampling_params=SamplingParams(max_tokens=5, ignore_eos=True),
                arrival_seconds=0.0,
            )
        )
    core.step(0.0)
    first, second = core.scheduler.running
    first.block_table[0] = second.block_table[0]
    with pytest.raises(AssertionError, match="another request wrote"):
        core.step(0.0)


def test_the_first_delta_tells_how_long_the_request_waited():
    core = make_core(FakeRunner(vocab_size=VOCAB_SIZE))
    core.add(
        EngineRequest(
            request_id="r",
            prompt_token_ids=[1, 1],
            sampling_params=SamplingParams(max_tokens=5, ignore_eos=True),
            arrival_seconds=10.0,
        )
    )
    assert [core.step(13.0).deltas[0].queue_seconds for _ in range(2)] == [3.0, None]


def test_seeds_of_requests_without_one_differ_and_can_be_reproduced():
    def run(seed: int) -> list[int]:
        core = make_core(FakeRunner(vocab_size=100), seed=seed, eos_token_ids=[])
        for i in range(2):
            core.add(
                EngineRequest(
                    request_id=f"r{i}",
                    prompt_token_ids=[1],
                    sampling_params=SamplingParams(max_tokens=1),
                    arrival_seconds=0.0,
                )
            )
        return [delta.new_token_ids[0] for delta in core.step(0.0).deltas]

    assert run(0) == run(0)
    assert run(0) != run(1)
    assert len(set(run(0))) == 2


def test_all_blocks_return_after_a_thousand_random_requests_with_aborts():
    random_ = random.Random(0)
    runner = FakeRunner(num_blocks=30, block_size=4, vocab_size=VOCAB_SIZE)
    core = make_core(runner, max_num_seqs=8, max_num_batched_tokens=64)
    for i in range(1000):
        core.add(
            EngineRequest(
                request_id=f"r{i}",
                prompt_token_ids=random_.choices(range(VOCAB_SIZE), k=random_.randint(1, 30)),
                sampling_params=SamplingParams(max_tokens=random_.randint(1, 20)),
                arrival_seconds=0.0,
            )
        )
        core.step(0.0)
        if random_.random() < 0.3:
            core.abort([f"r{random_.randint(0, i)}"])
    while core.has_work:
        output = core.step(0.0)
    core.check()
    assert core.scheduler.block_pool.num_free == 30
    assert output.stats.finished_total == 1000


def test_a_step_of_16_requests_costs_less_than_2_ms_around_the_model():
    class InstantRunner(FakeRunner):
        def execute(self, rows, copies=()):
            return [RowOutput(token_ids=[1] if row.sampling_params else []) for row in rows]

    runner = InstantRunner(num_blocks=8000, block_size=16, vocab_size=10, max_model_len=8192)
    core = make_core(runner, max_num_seqs=16, max_num_batched_tokens=100_000)
    for i in range(16):
        core.add(
            EngineRequest(
                request_id=f"r{i}",
                prompt_token_ids=[i % 10] * 4000,
                sampling_params=SamplingParams(max_tokens=1000),
                arrival_seconds=0.0,
            )
        )
    core.step(0.0)
    times = []
    for _ in range(100):
        started = time.perf_counter()
        core.step(0.0)
        times.append(time.perf_counter() - started)
    assert sorted(times)[50] < 2e-3
