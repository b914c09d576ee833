"""Steps on a GPU that is not there: what would be launched, and where the host would wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pagoda_kernels.launch import Launch, LaunchRecorder
from pagoda_runtime.config import EngineConfig
from pagoda_runtime.execution.memory import make_attention
from pagoda_runtime.execution.steps import StepRunner
from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.registry import make_model
from pagoda_runtime.platforms import Record, Replay
from pagoda_runtime.platforms.cuda import CudaPlatform
from pagoda_runtime.quantization import get_linear_method
from pagoda_runtime.quantization.base import Placement

GPU = torch.device("cuda", 0)
_COPIES = ("aten::to.", "aten::_to_copy", "aten::copy_")


class AbsentGpu(CudaPlatform):
    """A GPU that is not there; what is recorded on it is done again when it is replayed."""

    def recorder(self) -> Record:
        def record(run: Callable[[], None]) -> Replay:
            run()
            return run

        return record


@contextmanager
def absent_runner(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_num_seqs: int = 256,
    max_model_len: int = 8192,
    num_blocks: int = 65536,
    **flags: Any,
) -> Iterator[tuple[StepRunner, LaunchRecorder]]:
    """A runner of a model whose weights are fake, and what notes its launches.

    Within this context no tensor has data, so a step can be submitted and its result not asked for.

    Args:
        flags: of EngineConfig, as kv_cache_dtype, block_size and deterministic.
    """
    platform = AbsentGpu()
    engine_config = platform.complete(EngineConfig(model="", **flags))
    method = get_linear_method(config.quantization, dtype, GPU)
    placement = Placement(dtype, GPU, method, is_deterministic=engine_config.deterministic)
    with LaunchRecorder() as recorder, torch.no_grad():
        model = make_model(config, placement)
        model.after_loading()
        model.set_max_model_len(max_model_len)
        attention = make_attention(engine_config, model)
        attention.allocate(num_blocks + 1)
        yield (
            StepRunner(
                model,
                attention,
                platform,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
            ),
            recorder,
        )


def rehearse(
    config: ModelConfig, steps: Sequence[Sequence[ScheduledRow]], **settings: Any
) -> list[Launch]:
    """What kernels the steps would launch, in this order.

    Args:
        settings: of `absent_runner`.
    """
    with absent_runner(config, **settings) as (runner, recorder):
        for rows in steps:
            runner.submit(rows)
    return recorder.launches


class Watch(TorchDispatchMode):
    """Sees what goes between host and device. Raises AssertionError where the host would wait.

    A look at a number, or a shape that depends on numbers, raises under a LaunchRecorder anyway.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_sent = 0
        """Copies from the host to the device."""
        self.num_fetched = 0
        """And back."""
        self.num_operations: Counter[str] = Counter()
        """Of torch, on tensors of the device, by name."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name()
        if name.startswith("prim::"):
            return result
        inputs, outputs = _devices((args, kwargs)), _devices(result)
        if name.startswith(_COPIES):
            source = _devices(args[1] if name.startswith("aten::copy_") else args[0])
            if source != outputs:
                self._verify_copy(func, args, kwargs)
                self.num_sent += "cuda" in outputs
                self.num_fetched += "cpu" in outputs
                return result
        else:
            assert inputs != {"cpu", "cuda"}, f"{name} takes tensors of the host and of the device"
        if "cuda" in outputs:
            self.num_operations[name] += 1
        return result

    def _verify_copy(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        assert given.get("non_blocking"), f"{func.name()} copies while the host waits"


def _devices(values: Any) -> set[str]:
    """Of the tensors; a number on the host goes with any device's."""
    return {
        value.device.type
        for value in tree_leaves(values)
        if isinstance(value, torch.Tensor) and (value.dim() or value.device.type != "cpu")
    }
