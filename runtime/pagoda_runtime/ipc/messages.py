"""The values that cross boundaries: scheduler → runner, and engine process ↔ API process.

Plain data only, so that a step can be sent to other ranks and a message over a socket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.sampling_params import SamplingParams

# A depth that no sequence reaches.
NEVER = 1 << 60
# In the place of a token that is still being computed; no model has it.
PLACEHOLDER_TOKEN_ID = -1

Masks = Callable[[], Sequence[bytes]]
"""Waits for the masks of a step's rows that have a grammar, in order: see ScheduledRow.mask."""

FinishReason = Literal["stop", "length", "abort"]
"""stop: an end token, a stop id or a stop string."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """API → engine at its start, in JSON on standard input."""

    config: EngineConfig
    socket_folder: str
    log_level: str = "info"


class ScheduledRow(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of one sequence that one step computes, and what it wants of their logits."""

    request_id: str
    index: int = 0
    """Which choice of the request this sequence is."""
    token_ids: list[int]
    """Inputs of this step, at positions start, start + 1, …"""
    row_in_flight: int | None = None
    """The row of the step before, which may still be running, that samples the last of token_ids:
    PLACEHOLDER_TOKEN_ID stands there until that token is known."""
    start: int
    """Tokens of this sequence whose keys and values are in the cache already."""
    block_table: list[int]
    """Blocks that hold positions 0 … start + len(token_ids) - 1, in order; block 0 in place of
    blocks before every layer's window, which were given back."""
    sampling_params: SamplingParams | None
    """None when the row stops short of the sequence's last token, and so samples nothing."""
    seeds: tuple[int, ...] = (0,)
    """One token is drawn for each; a draw depends on (seed, position) and the logits alone."""
    num_candidates: int = 0
    """Above 0 for a beam: instead of a draw, that many likeliest tokens are wanted."""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    """Tokens that the sequence has generated before this step's."""
    history: list[int] | None = None
    """Prompt and output so far, for a row whose sampling_params ask what was said before."""
    prompt_targets: list[int] | None = None
    """For prompt_logprobs: the token that follows each of token_ids, as far as the prompt goes."""
    num_prompt_logprobs: int = 0
    """Likeliest tokens wanted at each of prompt_targets."""
    second_text_start: int = 0
    """Position from which tokens are of a pair's second text; 0: there is none that the model tells
    apart."""
    mask: bytes | None = None
    """What the row's grammar allows next, known while the model computes: bit i % 8 of byte i // 8
    for token i, up to a whole number of 32 bits."""

    @property
    def has_grammar(self) -> bool:
        """Whether the row samples a token that a grammar must allow."""
        return self.sampling_params is not None and self.sampling_params.grammar is not None


def with_masks(rows: Sequence[ScheduledRow], masks: Masks | None) -> Sequence[ScheduledRow]:
    """The rows with their masks. All rows of a step that have a grammar must be among them."""
    if masks is None or not any(row.has_grammar for row in rows):
        return rows
    waiting = iter(masks())
    return [
        msgspec.structs.replace(row, mask=next(waiting)) if row.has_grammar else row for row in rows
    ]


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of the probabilities at one position, after no processing of logits."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest token."""
    top: list[tuple[int, float]]
    """The likeliest tokens and their logprobs, best first."""


class RowOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What a step computed for one row."""

    token_ids: list[int] = []
    """One for each seed; for a beam its candidates, likeliest first."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each of token_ids, if sampling_params.logprobs asks for them."""
    token_logprobs: list[float] | None = None
    """The logprob of each of token_ids, for beams and for sampling_params.needs_logprobs."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """One for each of prompt_targets."""
    pooled: bytes | None = None
    """What a pooler made of the row, numbers in fp32."""


class BlockCopy(msgspec.Struct, frozen=True, array_like=True):
    """The content of a block, in all layers, goes to another before the step writes anything."""

    source: int
    target: int


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """API → engine: generate for this prompt."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    arrival_seconds: float
    """time.time() at acceptance in the API process."""
    priority: int = 0
    """Lower is served earlier."""
    cache_salt: str = ""
    """Prefixes are shared only among requests with the same salt."""
    stream_interval: int = 1
    """Tokens of a choice that are told at once, the first one excepted."""
    second_text_start: int = 0
    """As that of ScheduledRow."""


class AbortRequests(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """API → engine: forget these requests; their blocks are free within one step."""

    request_ids: list[str]


class FinishChoices(msgspec.Struct, frozen=True, kw_only=True, tag="finish"):
    """API → engine: these choices of a request have said enough (a stop string); others go on."""

    request_id: str
    indices: list[int]


class ResetPrefixCache(msgspec.Struct, frozen=True, kw_only=True, tag="reset_prefix_cache"):
    """API → engine: let no request find what is cached now. Answered by PrefixCacheReset."""


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    """API → engine: end the process."""


class RequestDelta(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one choice of a request after a step."""

    request_id: str
    index: int = 0
    """Which choice; 0 unless n or best_of is above 1, or beams were asked for."""
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One for each new token, if they were asked for."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """For the prompt's second and later tokens, with the first delta of choice 0."""
    finish_reason: FinishReason | None = None
    """None while it runs."""
    stop_reason: int | str | None = None
    """The stop token id that ended it; None for the model's own end token."""
    cumulative_logprob: float | None = None
    """Of all the choice's tokens so far, if best_of or beams need it."""
    is_last: bool = False
    """Whether this is the last delta of the whole request."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at first admission."""
    queue_seconds: float | None = None
    """Seconds from arrival to the first scheduling; sent with the first delta of choice 0."""
    pooled: bytes | None = None
    """The whole answer of an engine with a pooler, numbers in fp32."""
    error: str | None = None
    """Why the engine cannot go on with the request, which is the request's own fault."""

    def join(self, later: RequestDelta) -> RequestDelta:
        """Both as one; this delta's lists become the result's."""
        self.new_token_ids.extend(later.new_token_ids)
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs.extend(later.logprobs)
        return msgspec.structs.replace(
            later,
            new_token_ids=self.new_token_ids,
            logprobs=self.logprobs or later.logprobs,
            prompt_logprobs=self.prompt_logprobs or later.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens or later.num_cached_tokens,
            queue_seconds=self.queue_seconds,
        )


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's state after a step; counters count from the start of the process."""

    running: int = 0
    waiting: int = 0
    slots: int = 0
    """max_num_seqs"""
    kv_usage: float = 0.0
    """Used blocks over all blocks, 0 to 1; cached but unreferenced blocks count as free."""
    preemptions_total: int = 0
    finished_total: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    """Prompt tokens found there."""
    kv_waste: float = 0.0
    """Slots of held blocks without keys and values, over all slots of held blocks."""
    num_scheduled_tokens: int = 0
    """Tokens of the last step."""


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """Engine → API after each step (and once when it becomes idle)."""

    deltas: list[RequestDelta]
    stats: EngineStats


class PrefixCacheReset(msgspec.Struct, frozen=True, kw_only=True, tag="prefix_cache_reset"):
    """Engine → API: the prefix cache was emptied."""

    num_blocks: int
    """Blocks that held something to be found."""


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True, tag="loading"):
    """Engine → API while it starts; /startup shows it."""

    phase: str
    """download, convert, load, warmup"""
    percent: float
    bytes_per_second: float = 0.0
    eta_seconds: float | None = None
    """Until the phase ends."""


ScoreActivation = Literal["identity", "sigmoid", "tanh", "softmax"]
"""What makes probabilities, or scores, of a classifier's logits."""


class PoolerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine that generates nothing makes of a text, and what is yet to be done with it."""

    task: Literal["embed", "classify"]
    size: int
    """Numbers of a vector, or of logits."""
    is_normalized: bool = False
    """embed: whether vectors are to have the length 1."""
    dimensions: list[int] | None = None
    """embed: how short a vector may be cut; []: as short as one likes; None: not at all."""
    prompts: dict[str, str] = {}
    """embed: by name, what is to stand before a text."""
    default_prompt: str | None = None
    labels: list[str] = []
    """classify: of each logit."""
    activation: ScoreActivation = "identity"
    """classify."""


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """Engine → API once: the facts of the engine that serve requests from now on."""

    max_model_len: int
    block_size: int
    num_blocks: int
    vocab_size: int
    eos_token_ids: list[int]
    dtype: str
    kv_cache_dtype: str
    """Of keys and values, as --kv-cache-dtype names it; or the model's."""
    device: str
    architecture: str = ""
    """As config.json names the class."""
    quantization: str = "none"
    """How the weights are held, as --quantization names it."""
    tensor_parallel_size: int = 1
    """Ranks that divide the model."""
    max_num_seqs: int = 0
    """Sequences that run at once; the choices of one request count each. The engine process fills
    in this and the next."""
    max_num_batched_tokens: int = 2**31
    """Tokens of a step."""
    sliding_window: int = 0
    """Positions that a token sees at most, itself included; 0 if some layer sees all."""
    doubling_depth: int = NEVER
    """Position at which a token takes twice the work of the first one, because of attention."""
    default_sampling: dict[str, float | int] = msgspec.field(default_factory=dict)
    """What generation_config.json names of SamplingParams: temperature, top_p, top_k, min_p,
    repetition_penalty, max_tokens."""
    pooler: PoolerFacts | None = None
    """None: it generates. Else it has no KV cache, and a text is computed in one step."""


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """Engine → API as its last words."""

    reason: str
    message: str


class RankLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """Rank 0 → another rank, first of all."""

    config: EngineConfig
    """Its model is on this machine."""
    rank: int
    socket_folder: str
    parent_pid: int
    log_level: str


class RankStep(msgspec.Struct, frozen=True, array_like=True):
    """Rank 0 → the others: execute this too."""

    rows: Sequence[ScheduledRow]
    copies: Sequence[BlockCopy]


class RankReady(msgspec.Struct, frozen=True, tag="rank_ready"):
    """Rank → rank 0: it takes steps from now on."""


class RankStepDone(msgspec.Struct, frozen=True, tag="rank_step_done"):
    """Rank → rank 0 after each step."""


ToRank0 = RankReady | RankStepDone | EngineFailed
ToEngine = EngineRequest | AbortRequests | FinishChoices | ResetPrefixCache | Shutdown
ToApi = StepOutput | PrefixCacheReset | LoadProgress | EngineReady | EngineFailed
