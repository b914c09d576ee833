"""Sequences that share blocks: choices, beams, and prompts that part within a block."""

from __future__ import annotations

from pagoda_runtime import testing
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.ipc.messages import BlockCopy, EngineRequest
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.testing import FakeRunner


class Recorder(FakeRunner):
    """Keeps what it was told, and the most blocks that were held at a time."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.plans: list[tuple[list, list[BlockCopy]]] = []

    def execute(self, rows, copies=()):
        self.plans.append((list(rows), list(copies)))
        return super().execute(rows, copies)


def make_core(runner: FakeRunner, **limits: int) -> EngineCore:
    return testing.make_core(runner, **{"max_num_seqs": 16, "eos_token_ids": [], **limits})


def add(core: EngineCore, prompt: list[int], request_id: str = "r", **params: object) -> None:
    salt = str(params.pop("salt", ""))
    stream_interval = int(params.pop("stream_interval", 1))
    core.add(
        EngineRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(**params),
            arrival_seconds=0.0,
            cache_salt=salt,
            stream_interval=stream_interval,
        )
    )


def run(core: EngineCore) -> int:
    """Step until nothing is left; the most blocks that were held after a step."""
    most = 0
    while core.has_work:
        core.step(0.0)
        core.check()
        most = max(most, core.scheduler.block_pool.num_used)
    return most


def test_eight_choices_store_the_prompt_once_and_copy_only_its_last_partial_block():
    runner = Recorder(num_blocks=200, block_size=16, max_model_len=1024)
    core = make_core(runner)
    # 40 full blocks and 8 tokens.
    add(core, list(range(1, 91)) * 7 + list(range(1, 19)), n=8, max_tokens=6)
    core.step(0.0)
    assert core.scheduler.block_pool.num_used == 41
    core.step(0.0)
    tables = [row.block_table for row in runner.plans[1][0]]
    assert len(tables) == 8
    assert all(table[:40] == tables[0][:40] for table in tables)
    assert len({table[40] for table in tables}) == 8
    # Seven copy, the last one writes where it is.
    assert len(runner.plans[1][1]) == 7
    assert core.scheduler.block_pool.num_used == 40 + 8
    assert run(core) == 48
    assert not any(copies for _, copies in runner.plans[2:])


def test_choices_whose_prompt_fills_its_blocks_copy_nothing():
    runner = Recorder(num_blocks=50, block_size=4)
    core = make_core(runner)
    add(core, [1, 2, 3, 4, 5, 6, 7, 8], n=3, max_tokens=3)
    run(core)
    assert not any(copies for _, copies in runner.plans)


def test_four_beams_of_a_long_prompt_take_37_percent_of_the_blocks_of_four_sequences():
    runner = FakeRunner(num_blocks=200, block_size=16, max_model_len=1024)
    core = make_core(runner)
    add(core, list(range(64)) * 8, n=4, use_beam_search=True, temperature=0.0, max_tokens=64)
    most = run(core)
    separate = 4 * -(-(512 + 64) // 16)
    assert most <= 0.37 * separate


def test_a_prompt_that_parts_within_a_block_copies_what_it_has_in_common():
    runner = Recorder(num_blocks=20, block_size=8)
    core = make_core(runner)
    add(core, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], max_tokens=1)
    run(core)
    add(core, [1, 2, 3, 4, 5, 60, 70], max_tokens=1)
    run(core)
    rows, copies = runner.plans[-1]
    assert rows[0].start == 5
    assert rows[0].token_ids == [60, 70]
    assert [copy.target for copy in copies] == rows[0].block_table
    assert core.scheduler.prefix_cache_hits == 5


def test_the_next_turn_of_a_conversation_computes_only_what_was_not_said_yet():
    runner = Recorder(num_blocks=20, block_size=8)
    core = make_core(runner)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    add(core, prompt, max_tokens=4)
    tokens: list[int] = []
    while core.has_work:
        tokens += core.step(0.0).deltas[0].new_token_ids
    add(core, [*prompt, *tokens, 11, 12], max_tokens=1)
    core.step(0.0)
    # The last token of the answer was never computed.
    assert runner.plans[-1][0][0].token_ids == [tokens[-1], 11, 12]


def test_prefixes_are_shared_only_among_equal_salts():
    runner = Recorder(num_blocks=40, block_size=4)
    core = make_core(runner)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    starts = []
    for salt in ("", "one", "two", "one", ""):
        add(core, prompt, max_tokens=1, salt=salt)
        run(core)
        starts.append(runner.plans[-1][0][0].start)
    assert starts == [0, 0, 0, 8, 8]


def test_after_a_reset_nothing_is_found():
    runner = Recorder(num_blocks=40, block_size=4)
    core = make_core(runner)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    add(core, prompt, max_tokens=1)
    run(core)
    assert core.reset_prefix_cache() == 3
    core.check()
    add(core, prompt, max_tokens=1)
    run(core)
    assert runner.plans[-1][0][0].start == 0
    assert core.reset_prefix_cache() == 3


def test_who_asks_for_the_logprobs_of_the_prompt_gets_all_of_them_whatever_is_cached():
    core = make_core(FakeRunner(num_blocks=40, block_size=4), max_num_batched_tokens=3)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for _ in range(2):
        add(core, prompt, max_tokens=2, prompt_logprobs=0)
        deltas = []
        while core.has_work:
            deltas += core.step(0.0).deltas
        assert [entry.token_id for entry in deltas[0].prompt_logprobs] == prompt[1:]
        assert deltas[1].prompt_logprobs is None
    assert core.scheduler.prefix_cache_hits == 0


def test_a_choice_that_was_finished_lets_the_others_go_on():
    core = make_core(FakeRunner(num_blocks=40, block_size=4, max_model_len=64))
    add(core, [1, 2, 3], n=3, max_tokens=5)
    core.step(0.0)
    core.finish_choices("r", [1])
    core.check()
    deltas = []
    while core.has_work:
        deltas += core.step(0.0).deltas
    assert {delta.index for delta in deltas} == {0, 2}
    assert [delta.is_last for delta in deltas] == [False] * (len(deltas) - 1) + [True]


def test_tokens_wanted_in_bulk_come_first_one_then_many_then_the_rest():
    core = make_core(FakeRunner(num_blocks=40, block_size=4, max_model_len=64))
    add(core, [1, 2, 3], n=2, max_tokens=9, logprobs=0, stream_interval=5)
    deltas = []
    while core.has_work:
        deltas += core.step(0.0).deltas
    for index in (0, 1):
        of_choice = [delta for delta in deltas if delta.index == index]
        assert [len(delta.new_token_ids) for delta in of_choice] == [1, 5, 3]
        assert [len(delta.logprobs) for delta in of_choice] == [1, 5, 3]
        assert [delta.finish_reason for delta in of_choice] == [None, None, "length"]
    assert [delta.is_last for delta in deltas] == [False] * 5 + [True]


def test_tokens_that_were_held_back_are_forgotten_with_an_aborted_request():
    core = make_core(FakeRunner(num_blocks=40, block_size=4, max_model_len=64))
    add(core, [1, 2, 3], max_tokens=9, stream_interval=5)
    for _ in range(3):
        core.step(0.0)
    core.abort(["r"])
    assert core.step(0.0).deltas == []
    assert not core._deltas._held
