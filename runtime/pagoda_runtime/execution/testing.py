"""Drive a ModelRunner or a sampler without a scheduler, for tests and benchmarks of each alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pagoda_kernels.launch import Launch
from pagoda_runtime.execution.rehearsal import absent_runner
from pagoda_runtime.execution.runner import ModelRunner
from pagoda_runtime.ipc.messages import ScheduledRow
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.platforms import Record, Replay
from pagoda_runtime.platforms.cpu import CpuPlatform
from pagoda_runtime.sampling_params import SamplingParams

_COPIES = ("aten::to.", "aten::_to_copy", "aten::copy_")


class CpuAsDevice(CpuPlatform):
    """A CPU that is treated as a GPU is: tokens stay where they are, decode steps are recorded.

    What it records it runs again, so everything must lie where it lay.
    """

    is_asynchronous = True

    def __init__(self) -> None:
        self.num_replays = 0

    def recorder(self) -> Record:
        def record(run: Callable[[], None]) -> Replay:
            def replay() -> None:
                self.num_replays += 1
                run()

            run()
            return replay

        return record


def make_row(
    params: SamplingParams, *, seeds: Iterable[int] = (1,), position: int = 1, **fields: Any
) -> ScheduledRow:
    """A row of one token that is sampled at a position; fields: others of ScheduledRow."""
    return ScheduledRow(
        request_id="r",
        token_ids=[0],
        start=position - 1,
        block_table=[1],
        sampling_params=params,
        seeds=tuple(seeds),
        **fields,
    )


def generate(
    runner: ModelRunner,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    params: Sequence[SamplingParams] | None = None,
    chunk_size: int | None = None,
    blocks: Sequence[int] | None = None,
) -> list[list[int]]:
    """num_tokens new tokens for each prompt, all prompts in one batch; greedy without params.

    Args:
        chunk_size: prompt tokens of one row in one step; None: the whole prompt.
        blocks: block ids to hand out, in this order; None: ascending.
    """
    free = list(range(runner.num_blocks, 0, -1)) if blocks is None else list(reversed(blocks))
    greedy = SamplingParams(temperature=0.0)
    tokens = [list(prompt) for prompt in prompts]
    computed = [0] * len(prompts)
    tables: list[list[int]] = [[] for _ in prompts]
    ends = [len(prompt) + num_tokens for prompt in prompts]
    while running := [i for i, end in enumerate(ends) if len(tokens[i]) < end]:
        rows = []
        for index in running:
            last = len(tokens[index])
            if chunk_size is not None:
                last = min(last, computed[index] + chunk_size)
            while len(tables[index]) * runner.block_size < last:
                tables[index].append(free.pop())
            is_sampled = last == len(tokens[index])
            row_params = greedy if params is None else params[index]
            rows.append(
                ScheduledRow(
                    request_id=str(index),
                    token_ids=tokens[index][computed[index] : last],
                    start=computed[index],
                    block_table=tables[index],
                    sampling_params=row_params if is_sampled else None,
                    seeds=(row_params.seed or 0,),
                    num_prompt_tokens=len(prompts[index]),
                    num_output_tokens=len(tokens[index]) - len(prompts[index]),
                )
            )
            computed[index] = last
        for index, output in zip(running, runner.execute(rows), strict=True):
            tokens[index].extend(output.token_ids)
    return [row[len(prompt) :] for row, prompt in zip(tokens, prompts, strict=True)]


def generate_with_logits(
    runner: ModelRunner, prompts: Sequence[Sequence[int]], num_tokens: int
) -> tuple[list[list[int]], torch.Tensor]:
    """What `generate` returns, and the logits that each token was the largest of,
    [num_tokens, num_prompts, vocab_size] fp32.
    """
    find, seen = runner.model.logits, list[torch.Tensor]()

    def note(hidden: torch.Tensor) -> torch.Tensor:
        logits = find(hidden)
        seen.append(logits.float().clone())
        return logits

    runner.model.logits = note  # type: ignore[method-assign]
    return generate(runner, prompts, num_tokens), torch.stack(seen)


def transformers_tokens(
    folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int, *, longest: int = 0
) -> list[list[int]]:
    """What `generate` must return, from transformers in fp32.

    Args:
        longest: tokens of a sequence that the model sees first, and sizes a dynamic rope by.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs = []
    with torch.inference_mode():
        if longest:
            model(torch.ones(1, longest, dtype=torch.int64))
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
            )
            outputs.append(output[0, len(prompt) :].tolist())
    return outputs


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
