"""From a model's name to a model that computes."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pagoda_kernels.cpu.panels import E4M3, INT8, describe_products, has_panels
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.memory import format_bytes, must_fit
from pagoda_runtime.logs import timed
from pagoda_runtime.models.check import verify_kv_cache_dtype, verify_tensor_parallel
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.download import OnProgress
from pagoda_runtime.models.model import Model
from pagoda_runtime.models.registry import load_model_config, make_model
from pagoda_runtime.models.source import resolve_model
from pagoda_runtime.models.weights import load_weights, settle_by_weights
from pagoda_runtime.parallel import TensorParallel
from pagoda_runtime.platforms import Platform
from pagoda_runtime.platforms.machine import predicted_tokens_per_second
from pagoda_runtime.quantization.base import Placement
from pagoda_runtime.quantization.by_module import get_linear_method

logger = logging.getLogger(__name__)


def load_model(
    config: EngineConfig, platform: Platform, parallel: TensorParallel, on_progress: OnProgress
) -> Model:
    """Find, check and load the model, in the form it computes with. Raises: FatalError."""
    folder = resolve_model(
        config.model, config.revision, on_progress, quantization=config.quantization
    )
    model_config = load_model_config(
        folder, quantization=config.quantization, generation_config=config.generation_config
    )
    verify_tensor_parallel(model_config, parallel.size)
    verify_kv_cache_dtype(model_config, config.kv_cache_dtype)
    for level, note in model_config.notes:
        logger.log(level, note)
    model_config = settle_by_weights(model_config, folder)
    device = platform.device(parallel.rank)
    dtype = choose_dtype(config.dtype, model_config, device)
    method = get_linear_method(model_config.quantization)
    placement = Placement(dtype, device, method, parallel, config.deterministic)
    # By one rank, as several that measure at once slow each other down; before there are weights,
    # beside which its buffer would be the peak of memory.
    is_measured = parallel.rank == 0 and model_config.pooler is None
    bandwidth_gbps = platform.memory_bandwidth_gbps() if is_measured else None
    on_progress("load", 0.0, 0.0)
    remedy = "Use a smaller model or a larger device."
    with (
        must_fit(platform, f"The weights in {folder} do", remedy),
        timed("Loading the weights"),
        memory_given_back(),
        torch.inference_mode(),
    ):
        model = make_model(model_config, placement)
        _fill(model, folder, on_progress)
        model.after_loading()
    _log_weights(model, bandwidth_gbps)
    return model


def _fill(model: Model, folder: Path, on_progress: OnProgress) -> None:
    num_bytes = load_weights(
        model.weights(),
        folder,
        unused=model.unused_weights,
        prefix=model.config.prefix,
        fused=model.config.fused,
        on_progress=on_progress,
    )
    for name, shards in model.weights_beside.items():
        num_bytes += load_weights(shards, folder / name, on_progress=on_progress)
    logger.info("Read %s of weights", format_bytes(num_bytes))


def _log_weights(model: Model, bandwidth_gbps: float | None) -> None:
    """In what forms they are held, and how fast they can be read."""
    if quantization := model.config.quantization:
        logger.info(
            "Quantized by %s: a step reads %s of weights",
            quantization.method,
            format_bytes(model.step_bytes),
        )
        if model.placement.device.type == "cpu":
            logger.info(describe_products(model.placement.dtype))
    if copies := model.vocabulary_copies:
        forms = ", ".join(f"{form}: {format_bytes(size)}" for form, size in copies.items())
        logger.info("The tied vocabulary is held as a table, and %s", forms)
    if bandwidth_gbps is not None:
        logger.info(
            "Memory is read at %.1f GB/s, so one request gets about %.0f tokens/s at most",
            bandwidth_gbps,
            predicted_tokens_per_second(model.step_bytes, bandwidth_gbps),
        )


def choose_dtype(flag: str, model_config: ModelConfig, device: torch.device) -> torch.dtype:
    """What a model computes in. A quantized one in fp16, as most checkpoints have it, does so in
    bf16 on a CPU unless the flag says otherwise: in fp16 all its matrices would be widened.
    """
    dtype: torch.dtype = getattr(torch, model_config.dtype if flag == "auto" else flag)
    has_panels_of_8_bits = any(has_panels(numbers) for numbers in (INT8, E4M3))
    if (
        flag == "auto"
        and model_config.quantization
        and dtype is torch.float16
        and device.type == "cpu"
        and has_panels_of_8_bits
    ):
        logger.info("Computing in bfloat16 instead of float16, in which this CPU widens matrices")
        return torch.bfloat16
    return dtype


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Give large pieces of memory back to the system where they are freed.

    glibc else keeps pieces of up to 32 MiB for later ones, and what lies between weights that stay
    never fits these. Afterwards it has the thresholds that it would have come to by itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 128 << 10)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""As malloc.h has them."""
