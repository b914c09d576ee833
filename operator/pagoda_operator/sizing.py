"""What an engine needs of one GPU's memory, before there is one. Pure.

Weights and KV cache are the engine's own sums (`execution/memory.py`; `tests/contract` holds both
together). What steps, graphs and CUDA take is measured by an engine when it starts; here it is
estimated, from what an H100 was measured to need (docs/guides/sizing.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pagoda_operator.checkpoint import DTYPE_BYTES, Checkpoint
from pagoda_operator.flags import flag_value
from pagoda_operator.gpus import GIB, GpuMemory
from pagoda_operator.spec import Engine

# The engine's own defaults on a GPU.
BLOCK_SIZE = 16
MAX_NUM_BATCHED_TOKENS = 2048
LARGEST_GRAPH = 512
BYTES_OF_ROUNDED: Mapping[str, float] = {"fp8": 1.0, "int8": 1.0, "int4": 0.625}
"""Of a number of a matrix that is rounded when it is loaded, with its share of scales and zeros."""
# Measured: Llama 3.1 8B on an H100, see above.
_BYTES_OF_LOGIT = 22
_GRAPH_BYTES = 5 << 20
_CUDA_BYTES = int(0.85 * GIB)
# Not measured: what NCCL keeps on each of several GPUs.
_NCCL_BYTES = GIB // 2
_SCALE_BYTES = 4
"""Of a head's keys, and of its values, in a KV cache of 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Bytes of one GPU, and what is left of them for keys and values."""

    gpu: GpuMemory
    usable_bytes: int
    """The share that engine.gpuMemoryPercent allows."""
    weight_bytes: int
    overhead_bytes: int
    """Steps, graphs and CUDA, estimated."""
    block_bytes: int
    """Of block_size tokens, over all layers; 0: the model has no KV cache."""
    block_size: int
    max_positions: int
    asked_len: int | None
    """spec.engine.maxModelLen."""
    max_num_seqs: int

    @property
    def cache_bytes(self) -> int:
        return self.usable_bytes - self.weight_bytes - self.overhead_bytes

    @property
    def affordable_tokens(self) -> int:
        """That there is room for. Block 0 is the engine's own."""
        if not self.block_bytes:
            return 0
        return max(0, self.cache_bytes // self.block_bytes - 1) * self.block_size

    @property
    def max_model_len(self) -> int:
        """What a request may have; an engine that is not asked for a length takes what fits."""
        if self.asked_len is not None or not self.block_bytes:
            return self.asked_len or self.max_positions
        return min(self.max_positions, self.affordable_tokens)

    @property
    def num_tokens(self) -> int:
        """That the KV cache holds: never more than all requests together may have."""
        blocks = self.max_num_seqs * -(-self.max_model_len // self.block_size)
        return min(self.affordable_tokens, blocks * self.block_size)

    @property
    def needed_bytes(self) -> int:
        """Of the KV cache, for one request of the length that is asked for, or of a block."""
        if not self.block_bytes:
            return 0
        return (-(-(self.asked_len or self.block_size) // self.block_size) + 1) * self.block_bytes

    @property
    def missing_bytes(self) -> int:
        """At 0 and below it fits."""
        return self.needed_bytes - self.cache_bytes

    @property
    def num_requests(self) -> int:
        """Of max_model_len that the cache holds at once."""
        blocks = -(-self.max_model_len // self.block_size)
        return self.num_tokens // self.block_size // blocks if blocks else 0

    def with_overhead(self, share: float) -> Fit:
        return replace(self, overhead_bytes=int(self.overhead_bytes * share))


def size_engine(checkpoint: Checkpoint, engine: Engine, gpu: GpuMemory) -> Fit | None:
    """How the engine fills each of its GPUs; None where the weights' size is not known."""
    weights = weight_bytes(checkpoint, engine)
    if weights is None:
        return None
    return Fit(
        gpu=gpu,
        usable_bytes=gpu.total_bytes * engine.gpu_memory_percent // 100,
        weight_bytes=weights,
        overhead_bytes=overhead_bytes(checkpoint, engine),
        block_bytes=block_bytes(checkpoint, engine),
        block_size=block_size(engine),
        max_positions=checkpoint.max_position_embeddings,
        asked_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
    )


def dtype_of(checkpoint: Checkpoint, engine: Engine) -> str:
    return checkpoint.dtype if engine.dtype == "Auto" else flag_value(engine.dtype)


def weight_bytes(checkpoint: Checkpoint, engine: Engine) -> int | None:
    """Of one rank; None: a quantized checkpoint, or an encoder, whose size is not known."""
    size, width = engine.tensor_parallel_size, DTYPE_BYTES[dtype_of(checkpoint, engine)]
    if checkpoint.quantization is not None:
        return None if checkpoint.stored_bytes is None else checkpoint.stored_bytes // size
    if not checkpoint.generates:
        if checkpoint.stored_bytes is None:
            return None
        return checkpoint.stored_bytes * width // DTYPE_BYTES[checkpoint.dtype] // size
    heads, kv_heads = _heads_of_rank(checkpoint, size)
    hidden, inner = checkpoint.hidden_size, checkpoint.intermediate_size // size
    values = kv_heads * checkpoint.head_dim * hidden
    matrices = 2 * heads * checkpoint.head_dim * hidden + 2 * values + 3 * inner * hidden
    flag = flag_value(engine.quantization)
    layer = matrices * BYTES_OF_ROUNDED.get(flag, width)
    if flag == "int4":
        # v_proj is spared, and becomes int8.
        layer += values * (BYTES_OF_ROUNDED["int8"] - BYTES_OF_ROUNDED["int4"])
    num_tables = 1 if checkpoint.tie_word_embeddings else 2
    tables = num_tables * -(-checkpoint.vocab_size // size) * hidden * width
    return int(checkpoint.num_layers * layer) + tables


def block_size(engine: Engine) -> int:
    """Tokens of a KV block."""
    return engine.block_size or BLOCK_SIZE


def block_bytes(checkpoint: Checkpoint, engine: Engine) -> int:
    """Of a KV block of one rank, over all layers."""
    if not checkpoint.generates:
        return 0
    _, kv_heads = _heads_of_rank(checkpoint, engine.tensor_parallel_size)
    of_head = checkpoint.head_dim + _SCALE_BYTES
    if engine.kv_cache_dtype == "Auto":
        of_head = checkpoint.head_dim * DTYPE_BYTES[dtype_of(checkpoint, engine)]
    return checkpoint.num_layers * block_size(engine) * 2 * kv_heads * of_head


def overhead_bytes(checkpoint: Checkpoint, engine: Engine) -> int:
    """What the largest step, the graphs and CUDA take of one GPU, estimated."""
    size, width = engine.tensor_parallel_size, DTYPE_BYTES[dtype_of(checkpoint, engine)]
    heads, kv_heads = _heads_of_rank(checkpoint, size)
    # The hidden states in fp32 and normed; queries, keys, values and what is attended; the
    # feed-forward layer's two halves and their product.
    of_token = checkpoint.hidden_size * (4 + width)
    of_token += width * checkpoint.head_dim * 2 * (heads + kv_heads)
    of_token += width * 3 * checkpoint.intermediate_size // size
    num_tokens = engine.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS
    rows = min(engine.max_num_seqs, num_tokens) if checkpoint.generates else 0
    step = num_tokens * of_token + rows * checkpoint.vocab_size * _BYTES_OF_LOGIT
    num_recorded = min(rows, LARGEST_GRAPH)
    graphs = num_recorded * checkpoint.vocab_size * 4 + -(-num_recorded // 16) * _GRAPH_BYTES
    return step + graphs + _CUDA_BYTES + (_NCCL_BYTES if size > 1 else 0)


def _heads_of_rank(checkpoint: Checkpoint, size: int) -> tuple[int, int]:
    """Fewer KV heads than ranks are held by several."""
    return max(1, checkpoint.num_heads // size), max(1, checkpoint.num_kv_heads // size)
