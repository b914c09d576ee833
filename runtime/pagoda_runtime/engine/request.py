"""One request inside the engine."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from pagoda_runtime.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """A request catches up: `num_computed_tokens` follows `num_tokens`, and when it has reached it
    a new token is sampled. Prompt and output share one list, because a preempted request computes
    its own output again as if it were prompt.
    """

    request_id: str
    token_ids: list[int]
    """Prompt, then output."""
    sampling_params: SamplingParams
    seed: int
    arrival: int
    """Number in the order of arrival."""
    arrival_seconds: float
    num_prompt_tokens: int
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache."""
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chain hashes of the full blocks of token_ids, as far as they were needed."""
    num_registered_blocks: int = 0
    """Blocks of the table that the prefix cache was told of."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at first admission."""
    queue_seconds: float | None = None
    """Seconds from arrival to first admission."""
    num_preemptions: int = 0
    finish_reason: str | None = None
    stop_reason: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens not computed yet; 1 while the request decodes."""
        return len(self.token_ids) - self.num_computed_tokens
