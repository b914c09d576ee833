"""How many KV blocks there are, and the tensors that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.check import verify_max_model_len
from pagoda_runtime.models.config import ModelConfig

GIB = 2**30
# Share of the free memory of a CPU machine that the KV cache takes unless it is told otherwise.
CPU_DEFAULT_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class KvCacheSize:
    """num_blocks blocks of block_size tokens, which hold one sequence of max_model_len at least."""

    num_blocks: int
    """Blocks that the scheduler may hand out; block 0 comes on top of them."""
    block_size: int
    max_model_len: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes that the KV cache may take, and the knob that the user turns to change that."""

    available_bytes: int
    knob: str


def size_kv_cache(
    config: ModelConfig,
    budget: MemoryBudget,
    *,
    block_size: int,
    element_bytes: int,
    max_num_seqs: int,
    max_model_len: int | None,
) -> KvCacheSize:
    """Fit the cache into the budget; never more than max_num_seqs full sequences need.

    A max_model_len of None is the model's own, lowered to what fits.

    Raises: FatalError: InvalidFlags if max_model_len exceeds the model's positions,
        KvCacheTooSmall if one sequence of max_model_len tokens does not fit.
    """
    verify_max_model_len(config, max_model_len)
    limit = config.max_position_embeddings
    wanted_len = limit if max_model_len is None else max_model_len
    block_bytes = config.kv_elements_per_token * element_bytes * block_size
    # Block 0 is never handed out: padding is written there.
    affordable = budget.available_bytes // block_bytes - 1
    needed = -(-wanted_len // block_size)
    if affordable < needed and (max_model_len is not None or affordable < 1):
        raise _too_small(
            budget,
            needed_bytes=(min(needed, needed if max_model_len else 1) + 1) * block_bytes,
            wanted_len=wanted_len if max_model_len else block_size,
            fitting_len=max(0, affordable * block_size),
        )
    model_len = min(wanted_len, affordable * block_size)
    num_blocks = min(affordable, max_num_seqs * -(-model_len // block_size))
    return KvCacheSize(num_blocks, block_size, model_len, (num_blocks + 1) * block_bytes)


def _too_small(
    budget: MemoryBudget, *, needed_bytes: int, wanted_len: int, fitting_len: int
) -> FatalError:
    remedy = f"Raise {budget.knob} to at least {needed_bytes} bytes"
    if budget.knob != "--kv-cache-memory-bytes":
        remedy = f"Raise {budget.knob}, or set --kv-cache-memory-bytes to at least {needed_bytes}"
    shorter = f", or lower --max-model-len to at most {fitting_len}" if fitting_len else ""
    return FatalError(
        "KvCacheTooSmall",
        f"One sequence of {wanted_len} tokens needs {format_bytes(needed_bytes)} of KV cache, but "
        f"{format_bytes(max(0, budget.available_bytes))} is available. {remedy}{shorter}.",
    )


def format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes} bytes"


def allocate_kv_caches(
    config: ModelConfig, size: KvCacheSize, *, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """One tensor for each layer: [num_blocks + 1, block_size, 2, num_kv_heads, head_dim].

    Not cleared: unused slots are never read, and untouched pages take no memory.
    Raises: FatalError: OutOfMemory or GpuOutOfMemory.
    """
    shape = (size.num_blocks + 1, size.block_size, 2, config.num_kv_heads, config.head_dim)
    try:
        return [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
    except (RuntimeError, torch.OutOfMemoryError) as error:
        reason = "GpuOutOfMemory" if device.type == "cuda" else "OutOfMemory"
        raise FatalError(
            reason,
            f"{format_bytes(size.total_bytes)} of KV cache could not be allocated on {device}. "
            "Lower --kv-cache-memory-bytes or --max-num-seqs.",
        ) from error
