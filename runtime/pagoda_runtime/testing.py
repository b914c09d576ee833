"""A runner without a model, for tests of everything around it.

Its keys and values remember which token they are of and which tokens came before, and its tokens
depend on all that a row reads: a wrong block table, a false prefix hit or a block reused too early
is an AssertionError, or gives other tokens than `fake_next_token`.
`python -m pagoda_runtime.testing` is an engine process with this runner.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.core import EngineCore, Runner
from pagoda_runtime.engine.overlap import ThreadedRunner
from pagoda_runtime.engine.scheduler import SchedulerConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.ipc.messages import (
    BlockCopy,
    EngineReady,
    Masks,
    RowOutput,
    ScheduledRow,
    TokenLogprobs,
    with_masks,
)
from pagoda_runtime.models.download import OnProgress
from pagoda_runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pagoda_runtime.grammar.compiler import Grammars

_MASK = 2**64 - 1


def mix(state: int, value: int) -> int:
    """One step of a hash over all values so far."""
    state = (state ^ (value + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & _MASK
    return state ^ (state >> 29)


def fake_next_token(
    token_ids: Sequence[int], sampling_params: SamplingParams, seed: int, vocab_size: int
) -> int:
    """The token that FakeRunner samples after token_ids: a function of all of them."""
    return _sample(fake_state(token_ids), sampling_params, seed, vocab_size)


def fake_state(token_ids: Sequence[int]) -> int:
    """A hash of all tokens, as FakeRunner's slots hold it."""
    state = 0
    for token_id in token_ids:
        state = mix(state, token_id)
    return state


def _sample(state: int, sampling_params: SamplingParams, seed: int, vocab_size: int) -> int:
    if not sampling_params.is_greedy:
        state = mix(state, seed)
    return (state >> 16) % vocab_size


def fake_candidates(state: int, count: int, vocab_size: int) -> list[tuple[int, float]]:
    """Distinct tokens and falling logprobs, a function of the hash of all tokens before."""
    first, step = (state >> 16) % vocab_size, 1
    tokens = [(first + step * number) % vocab_size for number in range(min(count, vocab_size))]
    gap = 0.1 + (state >> 40) % 100 / 100
    return [(token_id, -0.2 - gap * number) for number, token_id in enumerate(tokens)]


@dataclass(frozen=True, slots=True)
class _Slot:
    """Keys and values of one token: its position, itself, and a hash of all up to it."""

    position: int
    token_id: int
    state: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step whose outputs are there."""

    outputs: list[RowOutput]

    def result(self) -> list[RowOutput]:
        return self.outputs


class FakeRunner:
    """Executes rows like `execution.runner.ModelRunner`, and verifies what it is told."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = 100,
        max_model_len: int = 128,
        eos_token_ids: Sequence[int] = (0,),
        sliding_window: int = 0,
        step_seconds: float = 0.0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = list(eos_token_ids)
        self.sliding_window = sliding_window
        self.step_seconds = step_seconds
        self.num_steps = 0
        self._cache: dict[tuple[int, int], _Slot] = {}

    @property
    def ready_facts(self) -> EngineReady:
        return EngineReady(
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            vocab_size=self.vocab_size,
            max_num_seqs=256,
            sliding_window=self.sliding_window,
            eos_token_ids=self.eos_token_ids,
            dtype="float32",
            kv_cache_dtype="float32",
            device="cpu",
        )

    def submit(
        self,
        rows: Sequence[ScheduledRow],
        copies: Sequence[BlockCopy] = (),
        masks: Masks | None = None,
    ) -> StepDone:
        return StepDone(self.execute(with_masks(rows, masks), copies))

    def execute(
        self, rows: Sequence[ScheduledRow], copies: Sequence[BlockCopy] = ()
    ) -> list[RowOutput]:
        """Copy, write every row's tokens, read every row's history. Raises AssertionError."""
        time.sleep(self.step_seconds)
        self.num_steps += 1
        assert rows, "a step without rows"
        self._copy(copies)
        written: dict[tuple[int, int], tuple[str, int]] = {}
        for row in rows:
            self._write(row, written)
        return [self._output(row, self._read(row)) for row in rows]

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        read = []
        for copy in copies:
            assert 1 <= copy.source <= self.num_blocks
            assert 1 <= copy.target <= self.num_blocks
            read.append(
                [self._cache.get((copy.source, offset)) for offset in range(self.block_size)]
            )
        for copy, slots in zip(copies, read, strict=True):
            for offset, slot in enumerate(slots):
                if slot is not None:
                    self._cache[copy.target, offset] = slot

    def _output(self, row: ScheduledRow, state: int) -> RowOutput:
        params = row.sampling_params
        targets = row.prompt_targets
        prompt_logprobs = None
        if targets is not None:
            prompt_logprobs = [TokenLogprobs(target, -1.0, 1, []) for target in targets]
        if params is None:
            return RowOutput(prompt_logprobs=prompt_logprobs)
        if row.num_candidates:
            candidates = fake_candidates(state, row.num_candidates, self.vocab_size)
            return RowOutput(
                token_ids=[token_id for token_id, _ in candidates],
                token_logprobs=[logprob for _, logprob in candidates],
            )
        token_ids = [_sample(state, params, seed, self.vocab_size) for seed in row.seeds]
        if row.mask is not None:
            allowed = [i for i in range(self.vocab_size) if row.mask[i // 8] >> i % 8 & 1]
            token_ids = [allowed[token_id % len(allowed)] for token_id in token_ids]
        logprobs = None
        if params.logprobs is not None:
            logprobs = [TokenLogprobs(token_id, -1.0, 1, []) for token_id in token_ids]
        return RowOutput(
            token_ids=token_ids,
            logprobs=logprobs,
            token_logprobs=[-1.0] * len(token_ids) if params.needs_logprobs else None,
            prompt_logprobs=prompt_logprobs,
        )

    def _place(self, row: ScheduledRow, position: int) -> tuple[int, int]:
        block = row.block_table[position // self.block_size]
        assert 1 <= block <= self.num_blocks, f"block {block} does not exist"
        return block, position % self.block_size

    def _write(self, row: ScheduledRow, written: dict[tuple[int, int], tuple[str, int]]) -> None:
        end = row.start + len(row.token_ids)
        assert row.token_ids, f"{row.request_id} has no tokens in this step"
        assert len(row.block_table) == -(-end // self.block_size), "blocks and tokens differ"
        state = self._cache[self._place(row, row.start - 1)].state if row.start else 0
        for position, token_id in enumerate(row.token_ids, row.start):
            assert 0 <= token_id < self.vocab_size
            place = self._place(row, position)
            writer = (row.request_id, row.index)
            other = written.setdefault(place, writer)
            assert other == writer, f"{other} and {writer} write to {place}"
            state = mix(state, token_id)
            self._cache[place] = _Slot(position, token_id, state)

    def _read(self, row: ScheduledRow) -> int:
        end = row.start + len(row.token_ids)
        first = max(0, row.start - self.sliding_window + 1) if self.sliding_window else 0
        state = 0
        for position in range(first, end):
            slot = self._cache[self._place(row, position)]
            # What a window hides is in the state of the first token that is seen.
            state = slot.state if first and position == first else mix(state, slot.token_id)
            assert slot.position == position, f"{row.request_id} reads another position's slot"
            assert slot.state == state, f"{row.request_id} reads what another request wrote"
        return state


def make_scheduler_config(facts: EngineReady, **limits: Any) -> SchedulerConfig:
    """For tests. limits: fields of EngineReady and SchedulerConfig that differ from facts' and from
    rules that bound nothing."""
    of_facts = {name: limits.pop(name) for name in facts.__struct_fields__ if name in limits}
    rules = {"long_prefill_token_threshold": 2048, "max_num_waiting": 1000}
    return SchedulerConfig(facts=msgspec.structs.replace(facts, **of_facts), **{**rules, **limits})


def make_core(
    runner: Runner,
    *,
    seed: int = 0,
    overlap: bool = False,
    grammars: Grammars | None = None,
    **limits: Any,
) -> EngineCore:
    """An EngineCore for tests; limits as in make_scheduler_config."""
    config = make_scheduler_config(runner.ready_facts, **limits)
    if overlap:
        runner = ThreadedRunner(runner)
    return EngineCore(runner, config, seed=seed, overlap=overlap, grammars=grammars)


def make_fake_runner(
    config: EngineConfig, on_progress: OnProgress, rank: int = 0, socket_folder: str = ""
) -> FakeRunner:
    """A FakeRunner from a config whose model is `fake:{...}`: keywords of FakeRunner as JSON.

    Beside them: "fail": [reason, message] raises FatalError at the start, "crash": true another
    exception, "load_seconds": N takes that long to be ready. "rank_1": {...} has other options for
    that rank.
    """
    options = json.loads(config.model.removeprefix("fake:") or "{}")
    of_ranks = {name: options.pop(name) for name in list(options) if name.startswith("rank_")}
    options |= of_ranks.get(f"rank_{rank}", {})
    logging.getLogger("pagoda.testing").info("Loading a fake")
    seconds = options.pop("load_seconds", 0.0)
    for percent in (0.0, 50.0):
        on_progress("load", percent, 1e6)
        time.sleep(seconds / 2)
    if "fail" in options:
        raise FatalError(*options["fail"])
    if options.pop("crash", False):
        raise ValueError("crashed as told")
    return FakeRunner(**options)


if __name__ == "__main__":
    from pagoda_runtime.engine import process, rank

    if sys.argv[1:] == ["rank"]:
        sys.exit(rank.main(make_fake_runner))
    sys.exit(process.main(make_fake_runner, rank_command=[*sys.orig_argv, "rank"]))
