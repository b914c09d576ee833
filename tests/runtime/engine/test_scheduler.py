from __future__ import annotations

import pytest

from pagoda_runtime.engine.overlap import fill_in_flight
from pagoda_runtime.engine.progress import advance
from pagoda_runtime.engine.request import ARRIVALS_PER_PRIORITY, Request, Sequence, Status
from pagoda_runtime.engine.scheduler import Scheduler, SchedulerOutput
from pagoda_runtime.errors import PromptTooLong, QueueFull, RequestError
from pagoda_runtime.ipc.messages import PLACEHOLDER_TOKEN_ID, EngineReady, RowOutput
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.testing import make_scheduler_config

EOS = 0


FACTS = EngineReady(
    max_model_len=1000,
    block_size=4,
    num_blocks=100,
    vocab_size=1000,
    eos_token_ids=[EOS],
    dtype="float32",
    kv_cache_dtype="float32",
    device="cpu",
    max_num_seqs=8,
    max_num_batched_tokens=64,
)


def make_scheduler(**limits: int) -> Scheduler:
    rules = {"long_prefill_token_threshold": 1000, "max_num_waiting": 8}
    return Scheduler(make_scheduler_config(FACTS, **{**rules, **limits}))


def add(
    scheduler: Scheduler, prompt: list[int], *, priority: int = 0, salt: str = "", **params: object
) -> Sequence:
    number = scheduler.finished_total + len(scheduler.requests)
    request = Request(
        request_id=f"r{number}",
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(**{"max_tokens": 50, **params}),
        seed=0,
        arrival=number,
        arrival_seconds=0.0,
        priority=priority,
        cache_salt=salt,
    )
    scheduler.add(request)
    return request.sequences[0]


def outputs_of(plan: SchedulerOutput, token: int = 7) -> list[RowOutput]:
    return [
        RowOutput(token_ids=[token] * len(row.seeds) if row.sampling_params else [])
        for row in plan.rows
    ]


def step(scheduler: Scheduler, token: int = 7) -> SchedulerOutput:
    plan = scheduler.schedule()
    advance(scheduler, plan, outputs_of(plan, token))
    scheduler.check()
    return plan


def num_tokens(plan: SchedulerOutput) -> list[int]:
    return [len(row.token_ids) for row in plan.rows]


def test_a_long_prompt_is_computed_in_chunks_and_samples_only_at_its_end():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    add(scheduler, [1] * 10)
    plans = [step(scheduler) for _ in range(4)]
    assert [num_tokens(plan) for plan in plans] == [[4], [4], [2], [1]]
    assert [plan.rows[0].sampling_params is None for plan in plans] == [True, True, False, False]


def test_decoding_requests_come_before_the_chunks_of_a_long_prompt():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    long = add(scheduler, [1] * 9)
    step(scheduler)
    short = add(scheduler, [2, 2, 2])
    step(scheduler)
    step(scheduler)
    assert [row.request_id for row in step(scheduler).rows][:1] == [long.request.request_id]
    late = add(scheduler, [3] * 9)
    plan = step(scheduler)
    assert num_tokens(plan) == [1, 1, 2]
    assert plan.sequences == [long, short, late]


def test_a_sequence_takes_the_blocks_of_its_chunk_and_has_the_others_reserved():
    scheduler = make_scheduler(num_blocks=5, block_size=4, max_num_batched_tokens=6)
    request = add(scheduler, [1] * 10)
    assert len(step(scheduler).rows[0].block_table) == 2
    assert (len(request.block_table), request.num_reserved_blocks) == (2, 1)
    # Three blocks are free, and one of them is spoken for.
    other = add(scheduler, [2] * 9)
    step(scheduler)
    assert other.status is Status.WAITING
    assert (len(request.block_table), request.num_reserved_blocks) == (3, 0)


def test_a_prompt_that_was_seen_before_computes_only_what_is_new():
    scheduler = make_scheduler(block_size=4)
    add(scheduler, [1, 2, 3, 4, 5, 6], max_tokens=1)
    step(scheduler)
    request = add(scheduler, [1, 2, 3, 4, 9])
    plan = step(scheduler)
    assert plan.rows[0].token_ids == [9]
    assert request.request.num_cached_tokens == 4
    assert scheduler.prefix_cache_hits == 4


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token():
    scheduler = make_scheduler(block_size=4)
    for _ in range(2):
        add(scheduler, [1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1)
        plan = step(scheduler)
    assert plan.rows[0].start == 7


def test_blocks_of_a_prompt_aborted_midway_are_found_only_as_far_as_they_were_computed():
    scheduler = make_scheduler(block_size=2, max_num_batched_tokens=4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    aborted = add(scheduler, prompt)
    step(scheduler)
    scheduler.abort([aborted.request.request_id])
    again = add(scheduler, prompt)
    assert step(scheduler).rows[0].start == 4
    assert again.request.num_cached_tokens == 4


def test_without_prefix_caching_nothing_is_found():
    scheduler = make_scheduler(block_size=4, enable_prefix_caching=0)
    for _ in range(2):
        add(scheduler, [1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1)
        plan = step(scheduler)
    assert plan.rows[0].start == 0


def test_a_request_waits_until_its_whole_prompt_fits():
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_num_batched_tokens=100)
    add(scheduler, [1] * 9)
    second = add(scheduler, [2] * 8)
    step(scheduler)
    assert second.status is Status.WAITING
    assert not second.block_table


def test_admission_leaves_a_reserve_for_the_running_but_an_empty_pool_has_none():
    scheduler = make_scheduler(num_blocks=100, block_size=1, max_num_batched_tokens=1000)
    whole = add(scheduler, [1] * 99, max_tokens=1)
    step(scheduler)
    assert whole.finish_reason == "length"
    add(scheduler, [2] * 50)
    beyond_reserve = add(scheduler, [3] * 48)
    step(scheduler)
    assert beyond_reserve.status is Status.WAITING


def test_the_request_with_the_least_computed_tokens_is_preempted_and_keeps_its_output():
    scheduler = make_scheduler(num_blocks=6, block_size=2, enable_prefix_caching=0)
    long = add(scheduler, [1] * 5)
    short = add(scheduler, [2] * 3)
    while not scheduler.preemptions_total:
        step(scheduler)
    assert scheduler.waiting[0] is short
    assert short.num_output_tokens > 0
    assert not short.block_table
    assert long.status is Status.RUNNING


def test_the_oldest_request_is_not_preempted_even_if_it_has_computed_least():
    scheduler = make_scheduler(num_blocks=6, block_size=2, enable_prefix_caching=0)
    oldest = add(scheduler, [1] * 3)
    add(scheduler, [2] * 5)
    while not scheduler.preemptions_total:
        step(scheduler)
    assert oldest.status is Status.RUNNING


def test_preempted_requests_return_to_the_head_of_the_queue_in_order_of_arrival():
    scheduler = make_scheduler(num_blocks=9, block_size=2, enable_prefix_caching=0, max_num_seqs=3)
    requests = [add(scheduler, [n] * 5, ignore_eos=True) for n in (1, 2, 3)]
    late = add(scheduler, [4] * 3)
    step(scheduler)
    while len(scheduler.waiting) < 3:
        step(scheduler)
    assert list(scheduler.waiting) == [requests[1], requests[2], late]


def test_a_request_alone_in_a_full_cache_ends_with_length():
    scheduler = make_scheduler(num_blocks=2, block_size=2)
    request = add(scheduler, [1] * 3)
    while scheduler.requests:
        step(scheduler)
    assert (request.finish_reason, request.num_output_tokens) == ("length", 2)


@pytest.mark.parametrize(
    ("params", "token", "reason", "stop_reason"),
    [
        ({"max_tokens": 2}, 7, "length", None),
        ({}, EOS, "stop", None),
        ({"stop_token_ids": (7,)}, 7, "stop", 7),
        ({"max_tokens": 3, "ignore_eos": True}, EOS, "length", None),
    ],
)
def test_a_request_ends_for_its_reason(params, token, reason, stop_reason):
    scheduler = make_scheduler()
    request = add(scheduler, [1, 2], **params)
    while scheduler.requests:
        step(scheduler, token)
    assert (request.finish_reason, request.stop_reason) == (reason, stop_reason)


def test_a_request_ends_at_max_model_len():
    scheduler = make_scheduler(max_model_len=6)
    request = add(scheduler, [1, 2, 3], max_tokens=None)
    while scheduler.requests:
        step(scheduler)
    assert request.num_tokens == 6


def test_an_aborted_request_frees_its_blocks_at_once():
    scheduler = make_scheduler()
    running = add(scheduler, [1] * 9)
    step(scheduler)
    waiting = add(scheduler, [2] * 9)
    scheduler.abort([running.request.request_id, waiting.request.request_id, "unknown"])
    assert scheduler.block_pool.num_used == 0
    assert not scheduler.requests


@pytest.mark.parametrize(
    ("limits", "numbers"),
    [({"max_model_len": 10}, ["10", "9"]), ({"num_blocks": 2, "block_size": 4}, ["10", "8"])],
)
def test_a_prompt_that_can_never_fit_is_refused_with_both_numbers(limits, numbers):
    scheduler = make_scheduler(**limits)
    with pytest.raises(PromptTooLong) as error:
        add(scheduler, [1] * 10)
    assert all(number in error.value.message for number in numbers)
    assert not scheduler.requests


def test_a_request_beyond_slots_and_queue_is_refused():
    scheduler = make_scheduler(max_num_seqs=1, max_num_waiting=1)
    add(scheduler, [1])
    add(scheduler, [1])
    with pytest.raises(QueueFull, match="--max-num-waiting"):
        add(scheduler, [1])


def test_a_request_of_higher_priority_overtakes_but_only_so_many_others():
    scheduler = make_scheduler(max_num_seqs=1, max_num_waiting=1000)
    add(scheduler, [1])
    step(scheduler)
    patient = add(scheduler, [2], priority=1)
    urgent = [add(scheduler, [3]) for _ in range(ARRIVALS_PER_PRIORITY + 1)]
    order = scheduler.waiting
    assert order[0] is urgent[0]
    assert order.index(patient) == ARRIVALS_PER_PRIORITY - 1


def test_a_long_prompt_takes_few_tokens_of_a_step_in_which_others_decode():
    scheduler = make_scheduler(max_num_batched_tokens=64, long_prefill_token_threshold=8)
    add(scheduler, [1] * 4)
    step(scheduler)
    add(scheduler, [2] * 20)
    add(scheduler, [3] * 20)
    assert [num_tokens(step(scheduler)) for _ in range(2)] == [[1, 8], [1, 8]]
    # The first prompt leaves 4 tokens of the 8 to the second.
    assert num_tokens(step(scheduler)) == [1, 4, 4]


def test_a_long_prompt_takes_fewer_tokens_the_deeper_it_is():
    scheduler = make_scheduler(
        num_blocks=1000,
        max_model_len=4000,
        max_num_batched_tokens=512,
        long_prefill_token_threshold=96,
        doubling_depth=1000,
    )
    add(scheduler, [1] * 4, max_tokens=200)
    step(scheduler)
    add(scheduler, [2] * 3000)
    chunks = [num_tokens(step(scheduler))[1] for _ in range(40)]
    assert chunks[0] == 96
    assert chunks == sorted(chunks, reverse=True)
    assert all(chunk % 4 == 0 for chunk in chunks)
    # At a depth of 1,000 half as many.
    assert 1000 < sum(chunks[: chunks.index(44)]) < 1200


def test_a_long_prompt_alone_takes_the_whole_step():
    scheduler = make_scheduler(max_num_batched_tokens=64, long_prefill_token_threshold=8)
    add(scheduler, [2] * 100)
    assert num_tokens(step(scheduler)) == [64]


def test_blocks_behind_the_window_are_given_back():
    scheduler = make_scheduler(block_size=4, sliding_window=6)
    sequence = add(scheduler, [1] * 10)
    step(scheduler)
    held = [scheduler.block_pool.num_used]
    for _ in range(20):
        step(scheduler)
        held.append(scheduler.block_pool.num_used)
    assert max(held) == held[0] == 3
    assert sequence.block_table[: sequence.num_behind_window] == [0] * 6
    assert len(sequence.block_table) == 8


def test_a_request_that_takes_more_slots_than_are_left_waits():
    scheduler = make_scheduler(max_num_seqs=4)
    add(scheduler, [1], n=2)
    step(scheduler)
    wide = add(scheduler, [2], n=3)
    step(scheduler)
    assert wide.status is Status.WAITING


def test_beams_that_may_never_fit_are_refused_with_both_numbers():
    scheduler = make_scheduler(num_blocks=12, block_size=4)
    with pytest.raises(RequestError) as error:
        add(scheduler, [1] * 9, use_beam_search=True, n=4, temperature=0.0, max_tokens=12)
    # 2 full blocks of the prompt, 3 more for each beam, and 1 that they part from.
    assert "15 KV cache blocks" in error.value.message
    assert "has 12" in error.value.message
    assert not scheduler.requests


@pytest.mark.parametrize(
    ("limits", "params", "words"),
    [
        ({"max_num_seqs": 4}, {"n": 5}, ["n is 5", "4", "--max-num-seqs"]),
        ({"max_num_seqs": 4}, {"best_of": 6}, ["best_of is 6", "4"]),
        (
            {"max_num_batched_tokens": 3},
            {"use_beam_search": True, "beam_width": 4},
            ["beam_width is 4", "3", "--max-num-batched-tokens"],
        ),
    ],
)
def test_more_sequences_than_can_run_together_are_refused(limits, params, words):
    scheduler = make_scheduler(**limits)
    with pytest.raises(RequestError) as error:
        add(scheduler, [1], **params)
    assert all(word in error.value.message for word in words)
    assert not scheduler.requests


def test_a_step_scheduled_ahead_names_the_row_whose_token_is_still_computed():
    scheduler = make_scheduler(block_size=4)
    first, second = add(scheduler, [1, 2, 3]), add(scheduler, [4, 5])
    before = scheduler.schedule()
    ahead = scheduler.schedule()
    assert [row.token_ids for row in ahead.rows] == [[PLACEHOLDER_TOKEN_ID]] * 2
    assert [row.row_in_flight for row in ahead.rows] == [0, 1]
    assert [row.start for row in ahead.rows] == [3, 2]
    # What ends with the first step is passed over in the second.
    advance(scheduler, before, [RowOutput(token_ids=[EOS]), RowOutput(token_ids=[7])])
    advance(scheduler, ahead, outputs_of(ahead, 8))
    scheduler.check()
    assert (first.finish_reason, first.token_ids) == ("stop", [1, 2, 3, EOS])
    assert second.token_ids == [4, 5, 7, 8]


def test_what_a_step_scheduled_ahead_lacks_comes_from_the_outputs_of_the_step_before():
    scheduler = make_scheduler()
    for prompt in ([1, 2, 3], [4, 5]):
        add(scheduler, prompt)
    scheduler.schedule()
    ahead = scheduler.schedule()
    filled = fill_in_flight(ahead.rows, [RowOutput(token_ids=[8]), RowOutput(token_ids=[9])])
    assert [row.token_ids for row in filled] == [[8], [9]]
    assert [row.row_in_flight for row in filled] == [None, None]


def test_what_is_known_to_end_is_not_planned_ahead():
    scheduler = make_scheduler()
    add(scheduler, [1, 2, 3], max_tokens=1)
    assert scheduler.schedule().rows
    assert not scheduler.schedule().rows
