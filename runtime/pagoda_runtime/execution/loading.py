"""From a model's name to a model that computes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pagoda_kernels.cpu.panels import INT8_AS_BF16, has_panels
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.execution.memory import format_bytes
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.decoder import Decoder
from pagoda_runtime.models.registry import load_model_config
from pagoda_runtime.models.source import OnProgress, resolve_model
from pagoda_runtime.models.weights import HEAD, load_weights, settle_by_weights
from pagoda_runtime.platforms import Platform
from pagoda_runtime.platforms.machine import predicted_tokens_per_second

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in the form it computes with, and what is known about it."""

    model: Decoder
    config: ModelConfig
    dtype: torch.dtype


def load_model(config: EngineConfig, platform: Platform, on_progress: OnProgress) -> LoadedModel:
    """Find, check and load the model. Raises: FatalError."""
    with timed("Finding the model"):
        folder = resolve_model(config.model, config.revision, on_progress)
    model_config = load_model_config(
        folder, quantization=config.quantization, generation_config=config.generation_config
    )
    for level, note in model_config.notes:
        logger.log(level, note)
    model_config = settle_by_weights(model_config, folder)
    dtype = getattr(torch, model_config.dtype if config.dtype == "auto" else config.dtype)
    _require_quantizable(model_config.quantization, dtype, platform)
    on_progress("load", 0.0, 0.0)
    try:
        with timed("Loading the weights"), torch.inference_mode():
            model = _load_weights(folder, model_config, dtype, config, platform, on_progress)
    except torch.OutOfMemoryError as error:
        raise FatalError(
            platform.out_of_memory,
            f"The weights in {folder} do not fit the memory of {platform.name}: {error}. "
            "Use a smaller model or a larger device.",
        ) from error
    return LoadedModel(model, model_config, dtype)


def _load_weights(
    folder: Path,
    model_config: ModelConfig,
    dtype: torch.dtype,
    config: EngineConfig,
    platform: Platform,
    on_progress: OnProgress,
) -> Decoder:
    model = Decoder(model_config, dtype=dtype, device=platform.device())
    ignored = (HEAD,) if model_config.tie_word_embeddings else ()
    targets = model.targets()
    num_bytes = load_weights(targets, folder, ignored=ignored, on_progress=on_progress)
    weight_bytes = _bytes_of_a_step(model_config, targets)
    # The layers drop what they pack.
    del targets
    model.after_loading()
    if config.deterministic:
        model.fix_rows()
    else:
        model.add_screen()
    logger.info("Read %s of weights", format_bytes(num_bytes))
    table = model.embed_tokens.weight
    if model_config.tie_word_embeddings and model.lm_head.method.copies_weight:
        logger.info(
            "The tied vocabulary is held as a table and packed: 2 x %s%s",
            format_bytes(table.nbytes),
            f", and in int8: {format_bytes(table.numel())}" if model.can_screen else "",
        )
    _log_prediction(weight_bytes, platform)
    return model


def _bytes_of_a_step(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> int:
    """What a decode step reads of weights, by their names in the checkpoint."""
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


def _require_quantizable(quantization: str | None, dtype: torch.dtype, platform: Platform) -> None:
    if quantization is None:
        return
    if platform.name != "cpu" or dtype is not torch.bfloat16 or not has_panels(INT8_AS_BF16):
        raise FatalError(
            "QuantizationMismatch",
            f"--quantization {quantization} (engine.quantization) needs a CPU that multiplies bf16 "
            f"(AVX512-bf16 and VBMI) and --dtype bfloat16; this is {platform.name} in "
            f"{str(dtype).removeprefix('torch.')}. Remove the flag.",
        )


def _log_prediction(weight_bytes: int, platform: Platform) -> None:
    bandwidth_gbps = platform.memory_bandwidth_gbps()
    if bandwidth_gbps is not None:
        logger.info(
            "Memory is read at %.1f GB/s, so one request gets about %.0f tokens/s at most",
            bandwidth_gbps,
            predicted_tokens_per_second(weight_bytes, bandwidth_gbps),
        )


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Log how long a phase of the start took."""
    started = time.monotonic()
    yield
    logger.info("%s took %.2f s", phase, time.monotonic() - started)
