"""The command line of an engine: from an LLMService to the arguments of `pagoda`. Pure.

A contract with the runtime, whose command line parses what is rendered here (`tests/contract`).
"""

from __future__ import annotations

import re

from pagoda_operator.spec import LLMService

PORT = 8000
MODELS_PATH = "/models"
API_KEYS_PATH = "/etc/pagoda/api-keys"
DRAIN_DELAY_SECONDS = 5


def engine_args(service: LLMService) -> list[str]:
    """The arguments of the `pagoda` command; the runtime's CLI parses them (`tests/contract`)."""
    spec, engine = service.spec, service.spec.engine
    args = ["serve", "--model", model_argument(spec.model.uri)]
    if spec.model.revision is not None:
        args += ["--revision", spec.model.revision]
    args += ["--served-model-name", service.model_name, *spec.model.aliases]
    args += ["--host", "0.0.0.0", "--port", str(PORT)]
    # Named, not detected: an engine that finds no GPU fails rather than crawls on the CPU.
    args += ["--device", "cuda" if spec.num_gpus else "cpu"]
    args += ["--tensor-parallel-size", str(engine.tensor_parallel_size)]
    if engine.dtype != "Auto":
        args += ["--dtype", flag_value(engine.dtype)]
    if engine.quantization != "Auto":
        args += ["--quantization", flag_value(engine.quantization)]
    if engine.kv_cache_dtype != "Auto":
        args += ["--kv-cache-dtype", flag_value(engine.kv_cache_dtype)]
    if engine.max_model_len is not None:
        args += ["--max-model-len", str(engine.max_model_len)]
    args += ["--max-num-seqs", str(engine.max_num_seqs)]
    if engine.max_num_batched_tokens is not None:
        args += ["--max-num-batched-tokens", str(engine.max_num_batched_tokens)]
    if engine.block_size is not None:
        args += ["--block-size", str(engine.block_size)]
    args += ["--gpu-memory-utilization", f"{engine.gpu_memory_percent / 100:.2f}"]
    args += ["--enable-prefix-caching" if engine.prefix_caching else "--no-enable-prefix-caching"]
    if spec.auth.api_keys_secret_ref is not None:
        args += ["--api-key-file", API_KEYS_PATH]
    args += ["--drain-delay-seconds", str(DRAIN_DELAY_SECONDS)]
    args += ["--drain-seconds", str(spec.lifecycle.drain_seconds)]
    if spec.lifecycle.stall_seconds is not None:
        args += ["--stall-seconds", str(spec.lifecycle.stall_seconds)]
    return [*args, *engine.extra_args]


def pull_args(service: LLMService) -> list[str]:
    """The arguments by which `pagoda` fetches the model and does no more."""
    model = service.spec.model
    revision = [] if model.revision is None else ["--revision", model.revision]
    return ["pull", model.uri, *revision]


def flag_value(choice: str) -> str:
    """The word that a flag has for a value of the CRD.

    FP8E4M3 is fp8_e4m3, and CompressedTensors compressed-tensors.
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", choice.replace("FP8E", "FP8_E")).lower()


def model_claim(uri: str) -> str | None:
    """The PersistentVolumeClaim that a model uri names, if it names one."""
    if not uri.startswith("pvc://"):
        return None
    return uri.removeprefix("pvc://").split("/", 1)[0]


def model_argument(uri: str) -> str:
    """What the engine calls a model: of a claim the folder where pods have it."""
    if (claim := model_claim(uri)) is None:
        return uri
    return MODELS_PATH + uri.removeprefix(f"pvc://{claim}").rstrip("/")
