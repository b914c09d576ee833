"""The values that cross boundaries: scheduler → runner, and engine process ↔ API process.

Plain data only, so that a step can be broadcast to other ranks and a message sent over a socket.
"""

from __future__ import annotations

import msgspec

from pagoda_runtime.sampling_params import SamplingParams


class ScheduledRow(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of one request that one step computes."""

    request_id: str
    token_ids: list[int]
    """Inputs of this step, at positions start, start + 1, …"""
    start: int
    """Tokens of this request whose keys and values are in the cache already."""
    block_table: list[int]
    """Blocks that hold positions 0 … start + len(token_ids) - 1, in order."""
    sampling_params: SamplingParams | None
    """None when the row stops short of the request's last token, and so samples nothing."""
    seed: int = 0
    """Seed of the request's sampling; a draw depends on (seed, position) alone."""


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """API → engine: generate for this prompt."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    arrival_seconds: float
    """time.time() at acceptance in the API process."""


class AbortRequests(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """API → engine: forget these requests; their blocks are free within one step."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    """API → engine: end the process."""


class RequestDelta(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one request after a step."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    """stop (end token or stop id), length, abort, or None while it runs."""
    stop_reason: int | str | None = None
    """The stop token id that ended it; None for the model's own end token."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at first admission."""
    queue_seconds: float | None = None
    """Seconds from arrival to the first scheduling; sent with the first delta."""


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
    num_scheduled_tokens: int = 0
    """Tokens of the last step."""


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """Engine → API after each step (and once when it becomes idle)."""

    deltas: list[RequestDelta]
    stats: EngineStats


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True, tag="loading"):
    """Engine → API while it starts; /startup shows it."""

    phase: str
    """download, load, warmup"""
    percent: float
    bytes_per_second: float = 0.0


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """Engine → API once: the facts of the engine that serve requests from now on."""

    max_model_len: int
    block_size: int
    num_blocks: int
    vocab_size: int
    eos_token_ids: list[int]
    dtype: str
    device: str
    default_sampling: dict[str, float | int] = msgspec.field(default_factory=dict)
    """temperature, top_p, top_k of generation_config.json, where it names them."""


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """Engine → API as its last words."""

    reason: str
    message: str


ToEngine = EngineRequest | AbortRequests | Shutdown
ToApi = StepOutput | LoadProgress | EngineReady | EngineFailed
