"""EngineCore on the fake runner, whose cache shows every wrong block: pagoda_runtime.testing."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from pagoda_runtime import testing
from pagoda_runtime.engine.beam import BeamSearch
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.engine.request import seed_of_choice
from pagoda_runtime.errors import RequestError
from pagoda_runtime.ipc.messages import EngineRequest, RowOutput
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.testing import FakeRunner, fake_candidates, fake_next_token, fake_state

VOCAB_SIZE = 3  # So few that prompts share beginnings by chance.
EOS = 0


def make_core(runner: FakeRunner, **overrides: object) -> EngineCore:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 7, "long_prefill_token_threshold": 5}
    return testing.make_core(runner, **{**limits, **overrides})


def unbatched(request: EngineRequest, max_num_tokens: int, index: int = 0) -> tuple[list[int], str]:
    """What a choice of the request gives when nothing else is in the world."""
    params, token_ids = request.sampling_params, list(request.prompt_token_ids)
    seed = seed_of_choice(params.seed or 0, index)
    output: list[int] = []
    while True:
        output.append(fake_next_token(token_ids, params, seed, VOCAB_SIZE))
        token_ids.append(output[-1])
        if output[-1] == EOS and not params.ignore_eos:
            return output, "stop"
        if len(output) == params.max_tokens or len(token_ids) >= max_num_tokens:
            return output, "length"


def unbatched_beams(request: EngineRequest, max_num_tokens: int) -> list[tuple[list[int], str]]:
    """The beams of the request, each computed from its own tokens alone."""
    params, prompt = request.sampling_params, list(request.prompt_token_ids)
    max_tokens = min(params.max_tokens or max_num_tokens, max_num_tokens - len(prompt))
    search = BeamSearch(params, eos_token_ids=[EOS], max_tokens=max_tokens)
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    while not search.is_done:
        candidates = [
            fake_candidates(fake_state([*prompt, *out]), search.num_candidates, VOCAB_SIZE)
            for out, _ in beams
        ]
        following = search.advance([out for out, _ in beams], [c for _, c in beams], candidates)
        beams = [([*beams[c.parent][0], c.token_id], c.cumulative_logprob) for c in following]
    return [(h.token_ids, h.finish_reason) for h in search.finished[: params.n]]


@st.composite
def sampling_params_strategy(draw: st.DrawFn) -> SamplingParams:
    kind = draw(st.sampled_from(["greedy", "random", "choices", "beams"]))
    width = draw(st.integers(2, 3))
    return SamplingParams(
        temperature=1.0 if kind in ("random", "choices") else 0.0,
        n=width if kind in ("choices", "beams") else 1,
        use_beam_search=kind == "beams",
        length_penalty=draw(st.sampled_from([0.0, 1.0, -1.0])) if kind == "beams" else 1.0,
        early_stopping=draw(st.sampled_from([True, False, "never"])) if kind == "beams" else False,
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.integers(1, 12)),
        ignore_eos=draw(st.booleans()),
        # The fake runner does not look at it: a sequence with a history is not planned ahead.
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.0])),
    )


@dataclass
class Arrival:
    """One request of a random run, and what becomes of it."""

    request: EngineRequest
    step: int
    abort_step: int | None
    finish_choice_step: int | None
    outputs: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    is_over: bool = False


@st.composite
def arrivals_strategy(draw: st.DrawFn) -> list[Arrival]:
    return [
        Arrival(
            EngineRequest(
                request_id=f"r{number}",
                prompt_token_ids=draw(
                    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=14)
                ),
                sampling_params=draw(sampling_params_strategy()),
                arrival_seconds=0.0,
                priority=draw(st.integers(-1, 1)),
                cache_salt=draw(st.sampled_from(["", "", "salt"])),
            ),
            step=draw(st.integers(0, 25)),
            abort_step=draw(st.one_of(st.none(), st.none(), st.integers(0, 40))),
            finish_choice_step=draw(st.one_of(st.none(), st.none(), st.integers(0, 40))),
        )
        for number in range(draw(st.integers(1, 8)))
    ]


@settings(max_examples=250)
@given(
    arrivals=arrivals_strategy(),
    num_blocks=st.integers(5, 24),
    block_size=st.integers(1, 4),
    max_num_seqs=st.integers(3, 6),
    max_num_batched_tokens=st.integers(3, 20),
    enable_prefix_caching=st.booleans(),
    sliding_window=st.sampled_from([0, 0, 3, 7]),
    overlap=st.booleans(),
)
def test_whatever_arrives_and_leaves_every_output_is_the_unbatched_one(
    arrivals,
    num_blocks,
    block_size,
    max_num_seqs,
    max_num_batched_tokens,
    enable_prefix_caching,
    sliding_window,
    overlap,
):
    runner = FakeRunner(
        num_blocks=num_blocks,
        block_size=block_size,
        vocab_size=VOCAB_SIZE,
        sliding_window=sliding_window,
    )
    core = make_core(
        runner,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
        sliding_window=sliding_window,
        overlap=overlap,
    )
    by_id = {arrival.request.request_id: arrival for arrival in arrivals}
    try:
        # Nobody starves: alone, one after the other, a token at a time, all would be through.
        limit = 60 + 2 * len(arrivals) * sum(
            len(a.request.prompt_token_ids) + 6 * (a.request.sampling_params.max_tokens or 0)
            for a in arrivals
        )
        for now in range(limit):
            _let_arrive_and_leave(core, arrivals, now)
            for delta in core.step(float(now)).deltas:
                arrival = by_id[delta.request_id]
                assert not arrival.is_over, "a delta after the last one"
                arrival.outputs.setdefault(delta.index, []).extend(delta.new_token_ids)
                if delta.finish_reason is not None:
                    arrival.reasons[delta.index] = delta.finish_reason
                arrival.is_over = delta.is_last
            core.check()
            if now > 40 and not core.has_work:
                break
        assert not core.has_work
        assert core.scheduler.block_pool.num_used == 0
        for arrival in arrivals:
            _verify_outputs(arrival, min(num_blocks * block_size + 1, runner.max_model_len))
    finally:
        core.close()


def _let_arrive_and_leave(core: EngineCore, arrivals: list[Arrival], now: int) -> None:
    for arrival in arrivals:
        request_id = arrival.request.request_id
        if arrival.step == now:
            try:
                core.add(arrival.request)
            except RequestError:
                arrival.is_over = True
        elif request_id in core.scheduler.requests:
            if arrival.abort_step == now:
                core.abort([request_id])
                arrival.is_over = True
            elif (
                arrival.finish_choice_step == now
                and not arrival.request.sampling_params.use_beam_search
                and core.scheduler.requests[request_id].is_forked
            ):
                core.finish_choices(request_id, [0])
                arrival.reasons[0] = "finished by the client"


def _verify_outputs(arrival: Arrival, max_num_tokens: int) -> None:
    request, outputs, reasons = arrival.request, arrival.outputs, arrival.reasons
    if request.sampling_params.use_beam_search:
        expected = unbatched_beams(request, max_num_tokens)
        found = [(outputs[index], reasons[index]) for index in sorted(outputs)]
        assert found in (expected, []) if arrival.is_over else found == expected
        return
    for index in range(request.sampling_params.n):
        tokens, reason = unbatched(request, max_num_tokens, index)
        if reasons.get(index) in ("stop", "length"):
            assert (outputs[index], reasons[index]) == (tokens, reason)
        else:
            assert arrival.is_over or index in reasons, f"choice {index} never ended"
            assert outputs.get(index, []) == tokens[: len(outputs.get(index, []))]


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


def test_a_block_that_was_to_be_copied_is_of_use_after_its_owner_was_preempted():
    """The choices of "forks" part in the step in which the prompts of the others need new blocks:
    what becomes its own tail is preempted, stays in the prefix cache and is found there.
    """
    core = make_core(
        FakeRunner(num_blocks=9, block_size=4, vocab_size=VOCAB_SIZE),
        max_num_seqs=5,
        max_num_batched_tokens=64,
        long_prefill_token_threshold=64,
    )
    prompts = {"first": [1, 2, 1, 2, 1], "forks": [1, 2, 1, 2, 1, 1], "b": [2] * 8, "c": [1] * 8}
    requests = [
        EngineRequest(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(
                n=2 if name == "forks" else 1, seed=1, max_tokens=4, ignore_eos=True
            ),
            arrival_seconds=0.0,
        )
        for name, prompt in prompts.items()
    ]
    for request in requests:
        core.add(request)
    outputs: dict[tuple[str, int], list[int]] = {}
    while core.has_work:
        output = core.step(0.0)
        core.check()
        for delta in output.deltas:
            outputs.setdefault((delta.request_id, delta.index), []).extend(delta.new_token_ids)
    assert output.stats.preemptions_total >= 2
    for request in requests:
        for index in range(request.sampling_params.n):
            assert outputs[request.request_id, index] == unbatched(request, 33, index)[0]


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
    right = [fake_next_token(s.token_ids, params, 0, 100) for s in (first, second)]
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
        # Of this thread alone: a busy machine makes nothing dearer.
        started = time.thread_time()
        core.step(0.0)
        times.append(time.thread_time() - started)
    assert sorted(times)[50] < 2e-3
