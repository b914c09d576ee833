"""Requests with grammars in the engine's core: real grammars, a runner without a model."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence

import pytest

from pagoda_runtime import testing
from pagoda_runtime.engine.core import EngineCore
from pagoda_runtime.errors import RequestError
from pagoda_runtime.grammar.compiler import Grammars
from pagoda_runtime.ipc.messages import EngineRequest, FinishReason, RequestDelta
from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.server.testing import ByteTokenizer
from pagoda_runtime.testing import FakeRunner

CODE = "[A-F]{6}-[0-9]{4}(x|yz)"


def make_core(*, overlap: bool = False, num_blocks: int = 256, **limits: int) -> EngineCore:
    runner = FakeRunner(vocab_size=256, num_blocks=num_blocks, max_model_len=400)
    grammars = Grammars(ByteTokenizer, vocab_size=256, end_token_ids=[0])
    return testing.make_core(
        runner, overlap=overlap, grammars=grammars, **{"max_num_seqs": 32, **limits}
    )


def add(core: EngineCore, request_id: str, regex: str | None = CODE, **params: object) -> None:
    grammar = None if regex is None else f"start: /{regex}/"
    core.add(
        EngineRequest(
            request_id=request_id,
            prompt_token_ids=[7, 8, len(request_id)],
            sampling_params=SamplingParams(**{"max_tokens": 64, "grammar": grammar} | params),
            arrival_seconds=time.time(),
        )
    )


def run(core: EngineCore) -> dict[tuple[str, int], list[RequestDelta]]:
    """The deltas of each choice."""
    told: dict[tuple[str, int], list[RequestDelta]] = {}
    while core.has_work:
        for delta in core.step(time.time()).deltas:
            told.setdefault((delta.request_id, delta.index), []).append(delta)
        core.check()
    return told


def end_of(deltas: Sequence[RequestDelta]) -> tuple[str, FinishReason | None]:
    text = bytes(token for delta in deltas for token in delta.new_token_ids)
    return text.rstrip(b"\0").decode(), deltas[-1].finish_reason


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_blocks", [256, 16])
def test_every_choice_fits_its_grammar_through_forks_and_preemptions(overlap, num_blocks):
    core = make_core(overlap=overlap, num_blocks=num_blocks)
    for number in range(6):
        add(core, "r" * (number + 1), n=4, seed=number)
        add(core, "p" * (number + 1), regex=None, max_tokens=20, ignore_eos=True)
    told = run(core)
    assert len(told) == 6 * 4 + 6
    ends = [end_of(deltas) for (name, _), deltas in told.items() if name.startswith("r")]
    assert [end for end in ends if not re.fullmatch(CODE, end[0]) or end[1] != "stop"] == []
    assert len({text for text, _ in ends}) > 12
    assert (core.scheduler.preemptions_total > 0) == (num_blocks == 16)


def test_a_preempted_choice_says_what_it_would_have_said():
    texts = []
    for num_blocks in (256, 16):
        core = make_core(num_blocks=num_blocks)
        for number in range(6):
            add(core, "r" * (number + 1), n=2, seed=number)
        texts.append({key: end_of(deltas) for key, deltas in run(core).items()})
    assert texts[0] == texts[1]


def test_a_grammar_that_ends_with_the_last_token_ends_with_stop():
    core = make_core()
    add(core, "exact", "ab", max_tokens=2)
    add(core, "short", "abc", max_tokens=2)
    told = run(core)
    assert end_of(told["exact", 0]) == ("ab", "stop")
    assert end_of(told["short", 0]) == ("ab", "length")
    assert told["exact", 0][-1].stop_reason is None


def test_an_end_token_comes_only_where_the_grammar_may_end():
    core = make_core()
    add(core, "e", "(ab)+", max_tokens=300, seed=1)
    add(core, "i", "(ab)+", max_tokens=100, ignore_eos=True)
    told = run(core)
    text, reason = end_of(told["e", 0])
    assert reason == "stop"
    assert told["e", 0][-1].new_token_ids == [0]
    assert text == "ab" * (len(text) // 2)
    assert end_of(told["i", 0]) == ("ab" * 50, "length")


def test_stop_ids_end_a_choice_in_the_middle_of_its_grammar():
    core = make_core()
    add(core, "s", "[A-F]{6}-x", stop_token_ids=(ord("-"),))
    delta = run(core)["s", 0][-1]
    assert (delta.finish_reason, delta.stop_reason) == ("stop", ord("-"))


def test_rows_with_a_grammar_wait_for_their_tokens_and_others_run_ahead():
    core = make_core(overlap=True)
    add(core, "g", "[a-z]{30}")
    add(core, "plain", None, max_tokens=30, ignore_eos=True)
    while not core.scheduler.requests:
        core.step(time.time())
    in_flight: dict[str, set[int]] = {"g": set(), "plain": set()}
    while core.has_work:
        core.step(time.time())
        for sequence in core.scheduler.running:
            in_flight[sequence.request.request_id].add(sequence.num_in_flight)
    assert max(in_flight["g"]) == 1
    assert max(in_flight["plain"]) >= 1
    assert 0 in in_flight["g"]


def test_a_request_waits_for_its_grammar_and_nobody_waits_for_it():
    plain_has_ended = threading.Event()

    def slow() -> ByteTokenizer:
        plain_has_ended.wait(10)
        return ByteTokenizer()

    grammars = Grammars(slow, vocab_size=256, end_token_ids=[0])
    runner = FakeRunner(vocab_size=256, max_model_len=400)
    core = testing.make_core(runner, grammars=grammars, max_num_seqs=4)
    add(core, "g", "ab")
    add(core, "plain", None, max_tokens=5, ignore_eos=True)
    order: list[str] = []
    while core.has_work:
        order += [d.request_id for d in core.step(time.time()).deltas if d.finish_reason]
        if "plain" in order:
            plain_has_ended.set()
    assert order == ["plain", "g"]


def test_a_request_with_a_bad_grammar_fails_alone():
    core = make_core()
    add(core, "bad", "(")
    add(core, "good", "ab")
    told = run(core)
    (end,) = told["bad", 0]
    assert (end.finish_reason, end.is_last) == ("abort", True)
    assert "The grammar is not valid" in (end.error or "")
    assert end_of(told["good", 0]) == ("ab", "stop")


def test_a_grammar_that_takes_too_long_fails_alone():
    def endless() -> ByteTokenizer:
        time.sleep(1)
        return ByteTokenizer()

    grammars = Grammars(endless, vocab_size=256, end_token_ids=[0], compile_seconds=0.05)
    core = testing.make_core(FakeRunner(vocab_size=256), grammars=grammars, max_num_seqs=4)
    add(core, "slow", "ab")
    add(core, "plain", None, max_tokens=5, ignore_eos=True)
    told = run(core)
    assert "not compiled after 0.05 seconds" in (told["slow", 0][-1].error or "")
    assert told["plain", 0][-1].finish_reason == "length"


def test_a_parked_request_can_be_aborted():
    core = make_core()
    add(core, "g", "ab")
    assert core.has_work
    core.abort(["g"])
    assert not core.has_work


def test_an_answer_that_becomes_too_complex_fails_alone():
    core = make_core()
    heavy = 'start: x\nx: x x x | "a" |\n'
    add(core, "heavy", None, grammar=heavy, max_tokens=390, ignore_eos=True)
    add(core, "light", "a{380}", max_tokens=390)
    told = run(core)
    assert told["light", 0][-1].finish_reason == "stop"
    assert told["heavy", 0][-1].finish_reason == "abort"
    assert "cannot follow its grammar" in (told["heavy", 0][-1].error or "")


def test_an_engine_without_grammars_refuses_them():
    core = testing.make_core(FakeRunner())
    with pytest.raises(RequestError, match="no grammars"):
        add(core, "g", "ab")
    assert not core.has_work
