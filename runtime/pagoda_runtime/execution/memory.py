"""The attention backend, and how many KV blocks it holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from pagoda_kernels.paged_attention import AttentionBackend, AttentionSpec, make_backend
from pagoda_runtime.config import KV_CACHE_DTYPES, EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.check import verify_max_model_len
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.model import Model
from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.platforms import MemoryBudget, Platform

logger = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True, slots=True)
class KvCacheSize:
    """num_blocks blocks, which hold one sequence of max_model_len tokens at least."""

    num_blocks: int
    """Blocks that the scheduler may hand out; block 0 comes on top of them."""
    max_model_len: int
    total_bytes: int


MakeBackend = Callable[[AttentionSpec], AttentionBackend]


def attention_spec(
    model: Model,
    kv_dtype: torch.dtype | None = None,
    *,
    block_size: int = 1,
    is_deterministic: bool,
) -> AttentionSpec:
    """What the model's layers ask of an attention; keys and values by default in its dtype."""
    placement, heads = model.placement, model.heads
    return AttentionSpec(
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        windows=model.windows,
        scale=model.attention_scale,
        dtype=placement.dtype,
        kv_dtype=kv_dtype or placement.dtype,
        block_size=block_size,
        device=placement.device,
        is_deterministic=is_deterministic,
    )


def make_attention(
    config: EngineConfig, model: Model, backend: MakeBackend = make_backend
) -> AttentionBackend:
    """What the model's layers attend with; nothing is allocated yet."""
    assert config.block_size is not None
    name = KV_CACHE_DTYPES.get(config.kv_cache_dtype)
    kv_dtype = getattr(torch, name) if name else None
    return backend(
        attention_spec(
            model, kv_dtype, block_size=config.block_size, is_deterministic=config.deterministic
        )
    )


def fit_kv_cache(
    config: EngineConfig,
    model_config: ModelConfig,
    attention: AttentionBackend,
    platform: Platform,
    parallel: TensorParallel,
    find_step_bytes: Callable[[], int],
) -> KvCacheSize:
    """The cache of an engine whose weights are loaded, of one size on all ranks.

    Args:
        find_step_bytes: says what the largest step needs beside weights and cache.
    Raises: FatalError: as `size_kv_cache`.
    """
    if config.kv_cache_memory_bytes is None:
        budget = platform.memory_budget(config, find_step_bytes())
    else:
        budget = MemoryBudget(config.kv_cache_memory_bytes, "--kv-cache-memory-bytes")
    available_bytes = parallel.smallest(budget.available_bytes, attention.spec.device)
    size = size_kv_cache(
        model_config,
        replace(budget, available_bytes=available_bytes),
        block_size=attention.spec.block_size,
        block_bytes=attention.block_bytes,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
    )
    logger.info(
        "KV cache: %d blocks of %d tokens in %s, %s",
        size.num_blocks,
        attention.spec.block_size,
        kv_dtype_name(attention.spec.kv_dtype),
        format_bytes(size.total_bytes),
    )
    limit = model_config.max_position_embeddings
    if config.max_model_len is None and size.max_model_len < limit:
        logger.warning(
            "max_model_len is %d: the KV cache holds no more of the model's %d. "
            "Raise --kv-cache-memory-bytes for longer contexts.",
            size.max_model_len,
            limit,
        )
    return size


def size_kv_cache(
    config: ModelConfig,
    budget: MemoryBudget,
    *,
    block_size: int,
    block_bytes: int,
    max_num_seqs: int,
    max_model_len: int | None,
) -> KvCacheSize:
    """Fit the cache into the budget; never more than max_num_seqs full sequences need.

    A max_model_len of None is the model's own, lowered to what fits.

    Raises: FatalError: InvalidFlags if max_model_len exceeds the model's positions,
        KvCacheTooSmall if one sequence of max_model_len tokens does not fit.
    """
    verify_max_model_len(config, max_model_len)
    # Block 0 is never handed out: padding is written there.
    affordable = budget.available_bytes // block_bytes - 1
    least_len = max_model_len or block_size
    needed = -(-least_len // block_size)
    fitting_len = affordable * block_size
    if affordable < needed:
        needed_bytes = (needed + 1) * block_bytes
        remedy = f"Raise {budget.knob} to at least {needed_bytes} bytes"
        if budget.knob != Platform.cache_flag:
            remedy = (
                f"Raise {budget.knob}, or set --kv-cache-memory-bytes to at least {needed_bytes}"
            )
        if affordable > 0:
            remedy += f", or lower --max-model-len to at most {fitting_len}"
        raise FatalError(
            "KvCacheTooSmall",
            f"One sequence of {least_len} tokens needs {format_bytes(needed_bytes)} of KV cache, "
            f"but {format_bytes(max(0, budget.available_bytes))} is available. {remedy}.",
        )
    model_len = min(max_model_len or config.max_position_embeddings, fitting_len)
    num_blocks = min(affordable, max_num_seqs * -(-model_len // block_size))
    return KvCacheSize(num_blocks, model_len, (num_blocks + 1) * block_bytes)


def format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes} bytes"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kv_dtype_name(dtype: torch.dtype) -> str:
    """As --kv-cache-dtype has it, with e4m3 written out."""
    flags = {name: flag for flag, name in KV_CACHE_DTYPES.items()}
    return flags.get(dtype_name(dtype), dtype_name(dtype))


@contextmanager
def must_fit(platform: Platform, what: str, remedy: str) -> Iterator[None]:
    """Raises FatalError OutOfMemory or GpuOutOfMemory if memory cannot be had: `what` not fit."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "CPUAllocator" not in str(error):
            raise
        raise FatalError(
            platform.out_of_memory,
            f"{what} not fit the memory of {platform.name}: {error} {remedy}",
        ) from error
