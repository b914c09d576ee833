"""Whether an engine can serve a model as its spec asks, decided before a GPU is taken. Pure.

What an engine would refuse when it starts is refused here with the engine's own reasons. What is
only estimated blocks nothing that may still fit: then there is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pagoda_operator.cause import Cause
from pagoda_operator.checkpoint import Checkpoint, CheckpointError
from pagoda_operator.flags import flag_value
from pagoda_operator.gpus import GIB, PRODUCTS, GpuMemory, find_gpu, memory_of, named_products
from pagoda_operator.names import Manifest
from pagoda_operator.sizing import BYTES_OF_ROUNDED, Fit, size_engine
from pagoda_operator.spec import Engine, LLMServiceSpec

TENSOR_PARALLEL_SIZES = (1, 2, 3, 4, 6, 8, 16)
"""Those that the CRD lets through."""
MAX_GPU_MEMORY_PERCENT = 95
"""That is proposed."""
# Of the estimate of what steps and CUDA take: what does not fit beside so much of it is refused.
_SURE_SHARE = 0.5
# Flags that change what is left for the KV cache; none of them has a field.
_UNKNOWN_FLAGS = (
    "--kv-cache-memory-bytes",
    "--enforce-eager",
)
_MEBIBYTE = 1 << 20
_MAX_WARNING = 1024


@dataclass(frozen=True, slots=True)
class Preflight:
    """What was found. `fit` is None where GPU or weights are not known, or there is no GPU."""

    problems: tuple[Cause, ...] = ()
    warnings: tuple[str, ...] = ()
    fit: Fit | None = None

    def fields(self) -> Manifest:
        """`status.preflight`."""
        fields: Manifest = {"result": "Failed" if self.problems else "Passed"}
        if self.warnings:
            fields["warnings"] = [text[:_MAX_WARNING] for text in self.warnings]
        if self.fit is not None:
            fields |= {
                "gpu": self.fit.gpu.name,
                "weights": quantity(self.fit.weight_bytes),
                "overhead": quantity(self.fit.overhead_bytes),
                "kvCache": quantity(max(0, self.fit.cache_bytes)),
                "kvCacheTokens": self.fit.num_tokens,
                "maxModelLen": self.fit.max_model_len,
                "concurrentRequests": self.fit.num_requests,
            }
        return fields


def unchecked(why: str) -> Manifest:
    """`status.preflight` of a model whose files could not be read: no reason to stop."""
    return {"result": "Unchecked", "warnings": [why[:_MAX_WARNING]]}


def of_checkpoint_error(error: CheckpointError) -> Preflight:
    """What is found where no spec helps."""
    return Preflight((Cause(error.reason, str(error), True),))


def check(spec: LLMServiceSpec, checkpoint: Checkpoint) -> Preflight:
    """What speaks against the spec, and how the model fits the GPU that it names."""
    problems = tuple(_find_mismatches(spec.engine, checkpoint))
    if problems:
        return Preflight(problems)
    if not spec.num_gpus:
        return Preflight()
    warnings = []
    given = {argument.partition("=")[0] for argument in spec.engine.extra_args}
    if unknown := sorted(given.intersection(_UNKNOWN_FLAGS)):
        return Preflight(warnings=(f"{', '.join(unknown)} of engine.extraArgs: not sized.",))
    gpu = find_gpu(spec)
    if gpu is None:
        return Preflight(warnings=(_describe_unknown_gpu(spec),))
    fit = size_engine(checkpoint, spec.engine, gpu)
    if fit is None:
        why = "The size of the weights is not known: there is no model.safetensors(.index.json)."
        return Preflight(warnings=(why,))
    if fit.with_overhead(_SURE_SHARE).missing_bytes > 0:
        cause = Cause("DoesNotFit", describe_misfit(spec, checkpoint, fit), True)
        return Preflight((cause,), fit=fit)
    if fit.missing_bytes > 0:
        warnings.append(f"It may not fit. {describe_misfit(spec, checkpoint, fit)}")
    elif fit.max_model_len < fit.max_positions and fit.asked_len is None:
        warnings.append(
            f"engine.maxModelLen will be about {fit.max_model_len}: the KV cache holds no more of "
            f"the model's {fit.max_positions} tokens."
        )
    return Preflight(warnings=tuple(warnings), fit=fit)


def quantity(num_bytes: int) -> str:
    return f"{num_bytes // _MEBIBYTE}Mi"


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def describe_misfit(spec: LLMServiceSpec, checkpoint: Checkpoint, fit: Fit) -> str:
    """What is missing, in numbers, and what helps, the smallest change first."""
    beside = (
        f"weights take {gib(fit.weight_bytes)}, steps and CUDA about {gib(fit.overhead_bytes)}, of "
        f"the {gib(fit.usable_bytes)} that engine.gpuMemoryPercent {spec.engine.gpu_memory_percent}"
        f" allows of {fit.gpu.name}"
    )
    if not fit.block_bytes:
        what = f"The model does not fit: its {beside}."
    else:
        asked = fit.asked_len
        length = f"of engine.maxModelLen {asked} tokens " if asked else "of one block "
        left = f"{gib(fit.cache_bytes)} is left" if fit.cache_bytes > 0 else "nothing is left"
        what = f"A request {length}needs {gib(fit.needed_bytes)} of KV cache, but {left}: {beside}."
    remedies = list(_find_remedies(spec, checkpoint, fit))
    return f"{what} {_join(remedies)}."


def _find_mismatches(engine: Engine, checkpoint: Checkpoint) -> Iterator[Cause]:
    """What the engine refuses whatever the device."""
    stored, flag = checkpoint.quantization, flag_value(engine.quantization)
    if stored is None and flag not in ("auto", "none", *BYTES_OF_ROUNDED):
        text = (
            f"engine.quantization is {engine.quantization}, but the checkpoint is not quantized "
            "(config.json has no quantization_config). Set it to Auto, or to FP8, INT8 or INT4, "
            "which round the weights when they are loaded."
        )
        yield Cause("QuantizationMismatch", text, True)
    if stored is not None and flag not in ("auto", stored.method):
        text = (
            f"engine.quantization is {engine.quantization}, but the checkpoint is quantized by "
            f"{stored.method} (quantization_config). Set it to Auto."
        )
        yield Cause("QuantizationMismatch", text, True)
    yield from _find_group_faults(checkpoint)
    wanted = flag_value(engine.kv_cache_dtype).replace("fp8_e4m3", "fp8")
    made_for = (stored.kv_cache_dtype if stored else None) or "auto"
    if "auto" not in (wanted, made_for) and wanted != made_for.replace("fp8_e4m3", "fp8"):
        text = (
            f"engine.kvCacheDtype is {engine.kv_cache_dtype}, but the checkpoint was made for "
            f"{made_for} (kv_cache_scheme in its quantization_config). Set it to Auto, or to that."
        )
        yield Cause("QuantizationMismatch", text, True)
    limit, asked = checkpoint.max_position_embeddings, engine.max_model_len
    if asked is not None and asked > limit:
        text = f"engine.maxModelLen is {asked}, but the model reaches {limit} tokens. Set it to "
        yield Cause("InvalidFlags", f"{text}at most {limit}.", True)
    if not divides(checkpoint, engine.tensor_parallel_size):
        sizes = [str(size) for size in TENSOR_PARALLEL_SIZES if divides(checkpoint, size)]
        text = (
            f"engine.tensorParallelSize is {engine.tensor_parallel_size}; it must divide the "
            f"model's {checkpoint.num_heads} attention heads and intermediate_size "
            f"{checkpoint.intermediate_size}, and divide its {checkpoint.num_kv_heads} KV heads or "
            f"be a multiple of them. Set it to one of: {', '.join(sizes)}."
        )
        yield Cause("InvalidFlags", text, True)


def divides(checkpoint: Checkpoint, size: int) -> bool:
    """Whether so many ranks can share the model."""
    few, many = sorted((size, checkpoint.num_kv_heads))
    uneven = checkpoint.num_heads % size or many % few or checkpoint.intermediate_size % size
    return not uneven


def _find_group_faults(checkpoint: Checkpoint) -> Iterator[Cause]:
    """Of a checkpoint whose quantization groups do not divide its matrices."""
    inputs = {
        "hidden_size": checkpoint.hidden_size,
        "num_attention_heads * head_dim": checkpoint.num_heads * checkpoint.head_dim,
        "intermediate_size": checkpoint.intermediate_size,
    }
    for group_size in checkpoint.quantization.group_sizes if checkpoint.quantization else ():
        for name, size in inputs.items():
            if size % group_size:
                text = (
                    f"config.json: {name} is {size}, which is no multiple of the group_size "
                    f"{group_size} in quantization_config. Serve another checkpoint of the model."
                )
                yield Cause("QuantizationMismatch", text, True)


def _find_remedies(spec: LLMServiceSpec, checkpoint: Checkpoint, fit: Fit) -> Iterator[str]:
    """Changes each of which makes it fit, the smallest first."""
    engine, gpu = spec.engine, fit.gpu

    def fits(changed: Engine, on: GpuMemory = gpu) -> bool:
        other = size_engine(checkpoint, changed, on)
        return other is not None and other.missing_bytes <= 0

    if fit.asked_len is not None and 0 < fit.affordable_tokens < fit.asked_len:
        yield f"lower engine.maxModelLen to at most {fit.affordable_tokens}"
    # Only what is left over is measured in percents: a little more may do.
    percents = range(engine.gpu_memory_percent + 1, MAX_GPU_MEMORY_PERCENT + 1)
    enough = (p for p in percents if fits(replace(engine, gpu_memory_percent=p)))
    if (percent := next(enough, None)) is not None:
        yield f"raise engine.gpuMemoryPercent to {percent}"
    if engine.kv_cache_dtype == "Auto" and fits(replace(engine, kv_cache_dtype="FP8")):
        yield "set engine.kvCacheDtype to FP8"
    if checkpoint.quantization is None and engine.quantization in ("Auto", "None"):
        for quantization in ("FP8", "INT4"):
            if fits(replace(engine, quantization=quantization)):
                yield f"set engine.quantization to {quantization}"
                break
    for size in TENSOR_PARALLEL_SIZES:
        is_more = size > engine.tensor_parallel_size and divides(checkpoint, size)
        if is_more and fits(replace(engine, tensor_parallel_size=size)):
            yield f"set engine.tensorParallelSize to {size}"
            break
    larger = (found for found in map(memory_of, PRODUCTS) if found is not None)
    fitting = next((on for on in larger if fits(engine, on)), None)
    if fitting is not None:
        yield f"use a GPU as {fitting.name} ({gib(fitting.total_bytes)})"


def _join(remedies: list[str]) -> str:
    if not remedies:
        return "No single change makes it fit; lower engine.maxModelLen and use more, larger GPUs"
    text = ", or ".join(remedies)
    return text[0].upper() + text[1:]


def _describe_unknown_gpu(spec: LLMServiceSpec) -> str:
    if unknown := [name for name in named_products(spec) if memory_of(name) is None]:
        return f"The memory of {', '.join(unknown)} is not known: the model was not sized."
    return "resources.gpu.products names no GPU: whether the model fits was not checked."
