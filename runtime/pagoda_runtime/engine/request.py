"""A request inside the engine, and the sequences of tokens that it runs."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pagoda_runtime.engine.beam import BeamSearch
from pagoda_runtime.ipc.messages import FinishReason, TokenLogprobs
from pagoda_runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pagoda_runtime.grammar.compiler import Matcher

# One step of priority is worth this many places in the order of arrival. So a stream of urgent
# requests delays the others by a bounded number of requests, and nobody waits for ever.
ARRIVALS_PER_PRIORITY = 256


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


def seed_of_choice(seed: int, index: int) -> int:
    """The seed of a choice; the first one's is the request's, as if it were alone."""
    return seed if index == 0 else derive_seed(seed, index)


def derive_seed(seed: int, name: object) -> int:
    """Another seed for each name, and for equal ones the same."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(slots=True, eq=False)
class Request:
    """What a client asked for. Its first sequence computes the prompt, and the others fork off."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    seed: int
    arrival: int
    """Number in the order of arrival."""
    arrival_seconds: float
    priority: int = 0
    cache_salt: str = ""
    stream_interval: int = 1
    """Tokens of a choice that are told at once."""
    second_text_start: int = 0
    """Of a pair: see ScheduledRow."""
    sequences: list[Sequence] = field(default_factory=list)
    """Those that are not finished; of beams all."""
    beams: BeamSearch | None = None
    is_forked: bool = False
    """Whether all its sequences exist; true from the start if there is only one."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at first admission."""
    queue_seconds: float | None = None
    """Seconds from arrival to first admission."""
    was_admitted: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    matcher: Matcher | None = None
    """The beginning of its grammar, which matchers alone know: the text in sampling_params, which
    go to all ranks at each step, is empty."""

    @property
    def rank(self) -> int:
        """The order of service, least first."""
        return self.arrival + self.priority * ARRIVALS_PER_PRIORITY

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    def start(self, beams: BeamSearch | None) -> Sequence:
        """Begin, or begin again, with the one sequence that computes the prompt."""
        matcher = None if self.matcher is None else self.matcher.fork()
        sequence = Sequence(self, 0, list(self.prompt_token_ids), self.seed, matcher=matcher)
        self.sequences = [sequence]
        self.beams = beams
        self.is_forked = self.sampling_params.num_sequences == 1
        return sequence


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence catches up: `num_computed_tokens` follows `num_tokens`, and when it has reached it
    a new token is sampled. Prompt and output share one list, because a preempted sequence computes
    its own output again as if it were prompt.
    """

    request: Request
    index: int
    token_ids: list[int]
    """Prompt, then output."""
    seed: int
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache once the steps so far have run."""
    num_in_flight: int = 0
    """Steps that were handed out and will sample a token of this sequence."""
    row_in_flight: int = -1
    """Its row in the last of them."""
    block_table: list[int] = field(default_factory=list)
    """0 in place of blocks that no layer can see any more."""
    num_reserved_blocks: int = 0
    """Free blocks that were set aside at its admission and that it has not taken yet."""
    num_behind_window: int = 0
    """Leading blocks of the table that were given back."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chain hashes of the full blocks of token_ids, as far as they were needed."""
    num_registered_blocks: int = 0
    """Blocks of the table that the prefix cache was told of."""
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    matcher: Matcher | None = None
    """Where the known output stands in the grammar."""

    @property
    def num_tokens(self) -> int:
        """Known tokens, and those that steps in flight will add."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.request.num_prompt_tokens

    @property
    def known_output(self) -> list[int]:
        return self.token_ids[self.request.num_prompt_tokens :]

    @property
    def num_pending_tokens(self) -> int:
        """Tokens not computed yet; 1 while the sequence decodes."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def unit(self) -> list[Sequence]:
        """The sequences that are scheduled and preempted together with this one."""
        return self.request.sequences if self.request.beams is not None else [self]

    @property
    def num_slots(self) -> int:
        """Places among the running sequences that it takes, those of its forks to come included."""
        request = self.request
        if request.beams is not None:
            # A small vocabulary may take some steps to fill the beams.
            return request.beams.width if self is request.sequences[0] else 0
        return 1 if request.is_forked else request.sampling_params.num_sequences

    @property
    def can_run_ahead(self) -> bool:
        """Whether its next step can be planned before the token of this one is known."""
        request = self.request
        return (
            request.beams is None
            and request.is_forked
            and not request.sampling_params.needs_history
            and self.matcher is None
        )

    def fork(self, index: int) -> Sequence:
        """A sequence with the same past. It shares the blocks: the caller holds them."""
        return Sequence(
            self.request,
            index,
            list(self.token_ids),
            seed_of_choice(self.request.seed, index),
            status=self.status,
            num_computed_tokens=self.num_computed_tokens,
            block_table=list(self.block_table),
            num_behind_window=self.num_behind_window,
            block_hashes=list(self.block_hashes),
            num_registered_blocks=self.num_registered_blocks,
            cumulative_logprob=self.cumulative_logprob,
            matcher=None if self.matcher is None else self.matcher.fork(),
        )
