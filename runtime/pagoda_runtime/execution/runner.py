"""Load a model and run the scheduler's steps on it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from pagoda_kernels.copy_blocks import copy_blocks
from pagoda_kernels.cpu.panels import INT8_AS_BF16, has_panels
from pagoda_kernels.paged_attention import GatherBuffer, HeadShape
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution import machine
from pagoda_runtime.execution.kv_cache import (
    CPU_DEFAULT_SHARE,
    MemoryBudget,
    allocate_kv_caches,
    format_bytes,
    size_kv_cache,
)
from pagoda_runtime.execution.logprobs import compute_logprobs
from pagoda_runtime.execution.sampler import sample, wants_likeliest
from pagoda_runtime.execution.step_input import prepare_step
from pagoda_runtime.ipc.messages import (
    BlockCopy,
    EngineReady,
    RowOutput,
    ScheduledRow,
    TokenLogprobs,
)
from pagoda_runtime.models.check import verify_supported
from pagoda_runtime.models.decoder import Decoder
from pagoda_runtime.models.registry import load_model_config
from pagoda_runtime.models.source import OnProgress, resolve_model
from pagoda_runtime.models.weights import HEAD, load_weights, settle_by_weights
from pagoda_runtime.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

# Beyond the caches, and measured in less than 0.1 s.
_PROBED_BYTES = 1 << 28
_NOTHING = RowOutput()
# Rows of a prompt whose logits are computed at once for prompt_logprobs.
_PROMPT_LOGPROBS_ROWS = 64


def no_progress(phase: str, percent: float, bytes_per_second: float) -> None:
    """The listener of those who do not care."""


class ModelRunner:
    """A loaded model with its KV cache.

    Raises: FatalError when the model cannot be loaded or does not fit.
    """

    def __init__(self, config: EngineConfig, on_progress: OnProgress = no_progress) -> None:
        verify_supported(config)
        self.device = choose_device(config.device)
        _verify_deterministic(config, self.device)
        configure_threads(config, self.device)
        with _timed("Finding the model"):
            folder = resolve_model(config.model, config.revision, on_progress)
        model_config = load_model_config(
            folder, quantization=config.quantization, generation_config=config.generation_config
        )
        for level, note in model_config.notes:
            logger.log(level, note)
        self.model_config = settle_by_weights(model_config, folder)
        dtype_name = self.model_config.dtype if config.dtype == "auto" else config.dtype
        self.dtype: torch.dtype = getattr(torch, dtype_name)
        _require_quantizable(self.model_config.quantization, self.dtype, self.device)
        with _timed("Loading the weights"), torch.inference_mode():
            self.model = self._load_model(folder, config, on_progress)
        self.block_size = config.by_device("block_size", self.device.type)
        self.is_deterministic = config.deterministic
        self.gather_buffer = GatherBuffer()
        self.heads = HeadShape(
            self.model_config.num_heads, self.model_config.num_kv_heads, self.model_config.head_dim
        )
        self.windows = sorted(set(self.model_config.sliding_windows))
        budget = self._memory_budget(config)
        size = size_kv_cache(
            self.model_config,
            budget,
            block_size=self.block_size,
            element_bytes=self.dtype.itemsize,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
        )
        self.num_blocks = size.num_blocks
        self.max_model_len = size.max_model_len
        self.model.set_max_model_len(self.max_model_len)
        self._log_size(size.total_bytes, config)
        with torch.inference_mode():
            self.kv_caches = allocate_kv_caches(
                self.model_config, size, dtype=self.dtype, device=self.device
            )
        on_progress("warmup", 0.0, 0.0)
        with _timed("Warming up"):
            self._warm_up()
        on_progress("warmup", 100.0, 0.0)
        self.ready_facts = EngineReady(
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            vocab_size=self.model_config.vocab_size,
            max_num_seqs=config.max_num_seqs,
            sliding_window=0 if 0 in self.windows else max(self.windows),
            doubling_depth=self.model_config.doubling_depth,
            eos_token_ids=list(self.model_config.eos_token_ids),
            dtype=dtype_name,
            device=self.device.type,
            default_sampling=dict(self.model_config.default_sampling),
        )

    @torch.inference_mode()
    def execute(
        self, rows: Sequence[ScheduledRow], copies: Sequence[BlockCopy] = ()
    ) -> list[RowOutput]:
        """Copy blocks, compute the rows' tokens, and return what each row asked for.

        Afterwards the cache holds each row's positions 0 … start + len(token_ids) - 1.
        """
        if copies:
            copy_blocks(
                self.kv_caches,
                sources=[copy.source for copy in copies],
                targets=[copy.target for copy in copies],
            )
        prepared = prepare_step(
            rows,
            block_size=self.block_size,
            heads=self.heads,
            windows=self.windows,
            buffer=self.gather_buffer,
            is_deterministic=self.is_deterministic,
            dtype=self.dtype,
            device=self.device,
        )
        hidden = self.model(prepared.step_input, self.kv_caches)
        outputs = [_NOTHING] * len(rows)
        if prepared.sampled_rows:
            sampled = [rows[index] for index in prepared.sampled_rows]
            chosen = self._sample(hidden.index_select(0, prepared.sampled_tokens), sampled)
            for index, output in zip(prepared.sampled_rows, chosen, strict=True):
                outputs[index] = output
        for index, row in enumerate(rows):
            if row.prompt_targets:
                first = prepared.first_tokens[index]
                outputs[index] = msgspec.structs.replace(
                    outputs[index], prompt_logprobs=self._prompt_logprobs(hidden[first:], row)
                )
        return outputs

    def _sample(self, hidden: torch.Tensor, rows: Sequence[ScheduledRow]) -> list[RowOutput]:
        """One output per row of hidden.

        Rows that want nothing but the likeliest token have no logits computed, if the model can do
        without, even among others that have: a request's tokens must not depend on its neighbours.
        """
        eos_token_ids = self.model_config.eos_token_ids
        plain = [index for index, row in enumerate(rows) if wants_likeliest(row)]
        if not plain or not self.model.can_screen:
            return sample(self.model.logits(hidden), rows, eos_token_ids)
        is_alone = len(plain) == len(rows)
        token_ids = self.model.likeliest(hidden if is_alone else hidden[plain]).tolist()
        outputs = {
            index: RowOutput(token_ids=[token_id] * len(rows[index].seeds))
            for index, token_id in zip(plain, token_ids, strict=True)
        }
        others = [index for index in range(len(rows)) if index not in outputs]
        if others:
            logits = self.model.logits(hidden[others])
            drawn = sample(logits, [rows[index] for index in others], eos_token_ids)
            outputs |= zip(others, drawn, strict=True)
        return [outputs[index] for index in range(len(rows))]

    def _prompt_logprobs(self, hidden: torch.Tensor, row: ScheduledRow) -> list[TokenLogprobs]:
        """Logprobs of row.prompt_targets, the first of which follows the first row of hidden."""
        targets = row.prompt_targets
        assert targets is not None
        found: list[TokenLogprobs] = []
        # In pieces: fp32 logits of a whole prompt would be larger than the model.
        for first in range(0, len(targets), _PROMPT_LOGPROBS_ROWS):
            some = targets[first : first + _PROMPT_LOGPROBS_ROWS]
            logits = self.model.logits(hidden[first : first + len(some)])
            found += compute_logprobs(logits, some, row.num_prompt_logprobs)
        return found

    def _load_model(self, folder: Path, config: EngineConfig, on_progress: OnProgress) -> Decoder:
        on_progress("load", 0.0, 0.0)
        try:
            model = Decoder(self.model_config, dtype=self.dtype, device=self.device)
            ignored = (HEAD,) if self.model_config.tie_word_embeddings else ()
            targets = model.targets()
            num_bytes = load_weights(targets, folder, ignored=ignored, on_progress=on_progress)
            weight_bytes = self._bytes_of_a_step(targets)
            # The layers drop what they pack.
            del targets
            model.after_loading()
            if config.deterministic:
                model.fix_rows()
            else:
                model.add_screen()
        except torch.OutOfMemoryError as error:
            raise FatalError(
                "GpuOutOfMemory" if self.device.type == "cuda" else "OutOfMemory",
                f"The weights in {folder} do not fit the memory of {self.device}: {error}. "
                "Use a smaller model or a larger device.",
            ) from error
        logger.info("Read %s of weights", format_bytes(num_bytes))
        table = model.embed_tokens.weight
        if self.model_config.tie_word_embeddings and model.lm_head.method.copies_weight:
            logger.info(
                "The tied vocabulary is held as a table and packed: 2 x %s%s",
                format_bytes(table.nbytes),
                f", and in int8: {format_bytes(table.numel())}" if model.can_screen else "",
            )
        if self.device.type == "cpu":
            _log_prediction(weight_bytes)
        return model

    def _bytes_of_a_step(self, weights: Mapping[str, torch.Tensor]) -> int:
        """What a decode step reads of weights, by their names in the checkpoint."""
        config = self.model_config
        num_bytes = 0
        for name, weight in weights.items():
            is_table = "embed_tokens" in name
            if is_table and not config.tie_word_embeddings:
                # A step reads its tokens' rows only.
                continue
            is_rounded = config.quantization == "int8" and weight.dim() == 2
            is_vocabulary = is_table or name == HEAD
            num_bytes += weight.numel() if is_rounded and not is_vocabulary else weight.nbytes
        return num_bytes

    def _memory_budget(self, config: EngineConfig) -> MemoryBudget:
        if config.kv_cache_memory_bytes is not None:
            return MemoryBudget(config.kv_cache_memory_bytes, "--kv-cache-memory-bytes")
        if self.device.type == "cuda":
            return self._profile_cuda(config)
        free = machine.free_memory_bytes()
        return MemoryBudget(int(free * CPU_DEFAULT_SHARE), "the memory limit (resources.memory)")

    def _profile_cuda(self, config: EngineConfig) -> MemoryBudget:
        """What gpu_memory_utilization leaves beside the weights and the largest step."""
        num_tokens = config.by_device("max_num_batched_tokens", self.device.type)
        # Logits dominate: one row for each sequence, in the model's dtype, and once more in fp32.
        rows = min(config.max_num_seqs, num_tokens)
        vocabulary = rows * self.model_config.vocab_size * (self.dtype.itemsize + 4)
        widest = 2 * self.model_config.intermediate_size + 4 * self.model_config.hidden_size
        activations = num_tokens * widest * (self.dtype.itemsize + 4)
        free, total = torch.cuda.mem_get_info(self.device)
        available = int(free - (1.0 - config.gpu_memory_utilization) * total)
        return MemoryBudget(
            available - vocabulary - activations,
            "--gpu-memory-utilization (engine.gpuMemoryPercent)",
        )

    def _log_size(self, total_bytes: int, config: EngineConfig) -> None:
        logger.info(
            "KV cache: %d blocks of %d tokens, %s",
            self.num_blocks,
            self.block_size,
            format_bytes(total_bytes),
        )
        if config.max_model_len is None and (
            self.max_model_len < self.model_config.max_position_embeddings
        ):
            logger.warning(
                "max_model_len is %d: the KV cache holds no more of the model's %d. "
                "Raise --kv-cache-memory-bytes for longer contexts.",
                self.max_model_len,
                self.model_config.max_position_embeddings,
            )

    def _warm_up(self) -> None:
        """Run one prefill and one decode step, so that the first request pays for no set-up."""
        num_tokens = min(self.block_size, self.max_model_len - 1)
        params = SamplingParams(temperature=0.0)
        for start, token_ids in ((0, [0] * num_tokens), (num_tokens, [0])):
            num_blocks = -(-(start + len(token_ids)) // self.block_size)
            self.execute(
                [
                    ScheduledRow(
                        request_id="warmup",
                        token_ids=token_ids,
                        start=start,
                        # Block 0 holds padding: nothing of the warm-up can be seen by a request.
                        block_table=[0] * num_blocks,
                        sampling_params=params,
                    )
                ]
            )


def _verify_deterministic(config: EngineConfig, device: torch.device) -> None:
    if config.deterministic and device.type != "cpu":
        raise FatalError(
            "InvalidFlags",
            "--deterministic is for the CPU in this version. Leave it out, or give --device cpu.",
        )


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise FatalError(
            "InvalidFlags",
            f"--device is {name}, and torch sees no such device here. Use cpu, or auto.",
        )
    return torch.device(name)


def configure_threads(config: EngineConfig, device: torch.device) -> None:
    """Set torch's threads and log what the engine computes with."""
    num_threads = config.num_threads or machine.allowed_cores()
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)
    logger.info("Device %s, instructions %s", device.type, machine.instruction_set())
    logger.info("%d threads", num_threads)


def _require_quantizable(
    quantization: str | None, dtype: torch.dtype, device: torch.device
) -> None:
    if quantization is None:
        return
    if device.type != "cpu" or dtype is not torch.bfloat16 or not has_panels(INT8_AS_BF16):
        raise FatalError(
            "QuantizationMismatch",
            f"--quantization {quantization} (engine.quantization) needs a CPU that multiplies bf16 "
            f"(AVX512-bf16 and VBMI) and --dtype bfloat16; this is {device.type} in "
            f"{str(dtype).removeprefix('torch.')}. Remove the flag.",
        )


def _log_prediction(weight_bytes: int) -> None:
    bandwidth_gbps = machine.memory_bandwidth_gbps(_PROBED_BYTES)
    logger.info(
        "Memory is read at %.1f GB/s, so one request gets about %.0f tokens/s at most",
        bandwidth_gbps,
        machine.predicted_tokens_per_second(weight_bytes, bandwidth_gbps),
    )


@contextmanager
def _timed(phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    logger.info("%s took %.2f s", phase, time.monotonic() - started)
