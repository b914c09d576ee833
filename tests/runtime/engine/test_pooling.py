"""Texts that are pooled over: whole in one step, without blocks, without tokens to follow."""

from __future__ import annotations

import pytest

from pagoda_runtime.engine.progress import advance
from pagoda_runtime.engine.request import Request, Status
from pagoda_runtime.engine.scheduler import Scheduler, SchedulerOutput
from pagoda_runtime.errors import PromptTooLong, QueueFull
from pagoda_runtime.ipc.messages import EngineReady, EngineRequest, PoolerFacts, RowOutput
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.testing import StepDone, make_core, make_scheduler_config

FACTS = EngineReady(
    max_model_len=50,
    block_size=0,
    num_blocks=0,
    vocab_size=1000,
    eos_token_ids=[],
    dtype="float32",
    kv_cache_dtype="none",
    device="cpu",
    max_num_seqs=4,
    max_num_batched_tokens=20,
    pooler=PoolerFacts(task="embed", size=1),
)


class PoolingRunner:
    """Makes the sum of a row's tokens its numbers."""

    ready_facts = FACTS

    def __init__(self):
        self.steps = []

    def submit(self, rows, copies=(), masks=None):
        assert all(row.start == 0 and row.sampling_params is not None for row in rows)
        self.steps.append([len(row.token_ids) for row in rows])
        return StepDone([RowOutput(pooled=bytes([sum(row.token_ids) % 256])) for row in rows])


def make_scheduler(**limits: int) -> Scheduler:
    return Scheduler(make_scheduler_config(FACTS, **limits))


def add(scheduler: Scheduler, num_tokens: int, *, priority: int = 0) -> Request:
    number = scheduler.finished_total + len(scheduler.requests)
    request = Request(
        request_id=f"r{number}",
        prompt_token_ids=[5] * num_tokens,
        sampling_params=SamplingParams(max_tokens=1),
        seed=0,
        arrival=number,
        arrival_seconds=0.0,
        priority=priority,
    )
    scheduler.add(request)
    return request


def finish(scheduler: Scheduler, plan: SchedulerOutput) -> list:
    deltas = advance(scheduler, plan, [RowOutput(pooled=b"1234") for _ in plan.rows])
    scheduler.check()
    return [delta for _, delta in deltas]


def num_tokens(plan: SchedulerOutput) -> list[int]:
    return [len(row.token_ids) for row in plan.rows]


def test_a_step_takes_whole_texts_up_to_its_tokens():
    scheduler = make_scheduler()
    for count in (8, 7, 6, 1):
        add(scheduler, count)
    first = scheduler.schedule()
    assert num_tokens(first) == [8, 7]
    finish(scheduler, first)
    assert num_tokens(scheduler.schedule()) == [6, 1]


def test_a_text_of_more_tokens_than_a_step_runs_alone():
    scheduler = make_scheduler()
    for count in (50, 1):
        add(scheduler, count)
    first = scheduler.schedule()
    assert num_tokens(first) == [50]
    assert first.num_scheduled_tokens == 50
    finish(scheduler, first)
    assert num_tokens(scheduler.schedule()) == [1]


def test_a_short_text_does_not_cut_a_long_one():
    scheduler = make_scheduler(long_prefill_token_threshold=2)
    for count in (1, 15):
        add(scheduler, count)
    assert num_tokens(scheduler.schedule()) == [1, 15]


def test_a_step_takes_no_more_texts_than_sequences():
    scheduler = make_scheduler()
    for _ in range(6):
        add(scheduler, 2)
    assert num_tokens(scheduler.schedule()) == [2] * 4


def test_the_next_step_is_planned_while_one_runs():
    scheduler = make_scheduler()
    for _ in range(3):
        add(scheduler, 10)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert (num_tokens(first), num_tokens(second)) == ([10, 10], [10])
    assert len(finish(scheduler, first)) == 2
    assert len(finish(scheduler, second)) == 1
    assert not scheduler.requests


def test_an_urgent_text_is_served_first():
    scheduler = make_scheduler()
    add(scheduler, 15)
    urgent = add(scheduler, 15, priority=-1)
    assert scheduler.schedule().rows[0].request_id == urgent.request_id


def test_an_aborted_text_leaves_its_place_and_has_no_answer():
    scheduler = make_scheduler()
    request = add(scheduler, 5)
    plan = scheduler.schedule()
    sequence = request.sequences[0]
    scheduler.abort([request.request_id])
    assert sequence.status is Status.FINISHED
    assert finish(scheduler, plan) == []


def test_a_text_may_fill_the_context_and_not_more():
    scheduler = make_scheduler()
    add(scheduler, 50)
    with pytest.raises(PromptTooLong, match="51 tokens; at most 50"):
        add(scheduler, 51)


def test_the_queue_is_bounded():
    scheduler = make_scheduler(max_num_waiting=0)
    for _ in range(4):
        add(scheduler, 1)
    with pytest.raises(QueueFull):
        add(scheduler, 1)


@pytest.mark.parametrize("overlap", [False, True])
def test_each_request_gets_its_own_numbers_in_one_delta(overlap):
    runner = PoolingRunner()
    core = make_core(runner, overlap=overlap)
    for number in range(9):
        core.add(
            EngineRequest(
                request_id=str(number),
                prompt_token_ids=[number] * (number + 1),
                sampling_params=SamplingParams(max_tokens=1),
                arrival_seconds=0.0,
            )
        )
    deltas = []
    while core.has_work:
        output = core.step(1.0)
        deltas += output.deltas
        core.check()
        assert (output.stats.kv_usage, output.stats.kv_waste) == (0.0, 0.0)
    assert {delta.request_id: delta.pooled for delta in deltas} == {
        str(number): bytes([number * (number + 1)]) for number in range(9)
    }
    assert all(delta.is_last and delta.finish_reason == "stop" for delta in deltas)
    assert max(map(sum, runner.steps)) <= 20
