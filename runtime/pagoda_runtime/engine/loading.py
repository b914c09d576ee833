"""How a process of the engine comes by its runner."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.engine.core import Runner
from pagoda_runtime.logs import timed
from pagoda_runtime.models.download import OnProgress
from pagoda_runtime.models.registry import load_model_config
from pagoda_runtime.models.source import read_ahead, resolve_model
from pagoda_runtime.platforms import choose_platform

MakeRunner = Callable[[EngineConfig, OnProgress, int, str], Runner]
"""Of a config, a listener, a rank, and the folder in which ranks find each other."""
FindModel = Callable[[EngineConfig, OnProgress], EngineConfig]
"""The config with a model that is on this machine."""


UseDevice = Callable[[EngineConfig, int], None]
"""Lets a thread compute on a rank's device."""


def find_model(config: EngineConfig, on_progress: OnProgress) -> EngineConfig:
    """Raises: FatalError: as `resolve_model`."""
    with timed("Finding the model"):
        folder = resolve_model(
            config.model, config.revision, on_progress, quantization=config.quantization
        )
    return replace(config, model=str(folder), revision=None)


def make_model_runner(
    config: EngineConfig, on_progress: OnProgress, rank: int, socket_folder: str
) -> Runner:
    """A rank's runner; of several once all have come and can compute. The model is on this machine.

    Raises: FatalError.
    """
    # The disk has to do while libraries are imported.
    threading.Thread(target=read_ahead, args=[config.model], daemon=True).start()
    # Here and not above: they take torch with them, which the tests of this room do without.
    from pagoda_runtime.execution.pooling_runner import PoolingRunner
    from pagoda_runtime.execution.runner import ModelRunner
    from pagoda_runtime.parallel import ALONE, connect

    parallel, size = ALONE, config.tensor_parallel_size
    if size > 1:
        platform = choose_platform(config.device)
        platform.verify(config)
        platform.verify_ranks(size)
        device = platform.device(rank)
        parallel = connect(rank, size, socket_folder, device, backend=platform.collectives)
    model_config = load_model_config(Path(config.model), quantization=config.quantization)
    if model_config.pooler is None:
        return ModelRunner(config, on_progress, parallel)
    return PoolingRunner(config, on_progress, parallel)


def use_device(config: EngineConfig, rank: int) -> None:
    """Let this thread compute on a rank's device: threads begin with the first of the machine."""
    choose_platform(config.device).use_device(rank)
