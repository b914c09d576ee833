"""What can be refused before anything is loaded: flags, paths and configs, without torch."""

from __future__ import annotations

from pagoda_runtime.config import KV_CACHE_DTYPES, EngineConfig
from pagoda_runtime.convert.cache import require_gguf
from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.config import ModelConfig
from pagoda_runtime.models.registry import load_model_config
from pagoda_runtime.models.source import local_path
from pagoda_runtime.platforms import PLATFORMS
from pagoda_runtime.tokenizer.tokenizer import read_tokenizer_file


def verify_start(config: EngineConfig) -> None:
    """Refuse what only another flag, path or config mends; a model of a hub is not asked for.

    Raises: FatalError: a reason of USAGE_REASONS.
    """
    verify_supported(config)
    path = local_path(config.model)
    if path is None:
        return
    if path.is_file():
        require_gguf(path)
        return
    if not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
        raise FatalError(
            "ModelNotFound",
            f"{path} is no folder in Hugging Face layout: it has no config.json, but GGUF files. "
            f"Give --model (model.uri) one of them, such as {files[0]}.",
        )
    model = load_model_config(
        path, quantization=config.quantization, generation_config=config.generation_config
    )
    verify_max_model_len(model, config.max_model_len)
    verify_tensor_parallel(model, config.tensor_parallel_size)
    verify_kv_cache_dtype(model, config.kv_cache_dtype)
    read_tokenizer_file(path)


def verify_supported(config: EngineConfig) -> None:
    """Raises FatalError InvalidFlags for flags that no device which may be meant can serve."""
    meant = [p for name, p in PLATFORMS.items() if config.device in ("auto", name)]
    refused: list[FatalError] = []
    for platform in meant:
        try:
            platform.verify(config)
        except FatalError as error:
            refused.append(error)
    if refused and len(refused) == len(meant):
        raise refused[-1]


def verify_max_model_len(config: ModelConfig, max_model_len: int | None) -> None:
    """Raises FatalError InvalidFlags for a context that is longer than the model's."""
    limit = config.max_position_embeddings
    if max_model_len is not None and max_model_len > limit:
        raise FatalError(
            "InvalidFlags",
            f"--max-model-len (engine.maxModelLen) is {max_model_len}, but the model "
            f"reaches {limit} tokens (max_position_embeddings and rope). Give at most {limit}.",
        )


def verify_kv_cache_dtype(config: ModelConfig, flag: str) -> None:
    """Raises FatalError QuantizationMismatch for a flag against what a checkpoint was made for."""
    made_for = config.quantization and config.quantization.kv_cache_dtype
    if made_for and flag in KV_CACHE_DTYPES and KV_CACHE_DTYPES[flag] != KV_CACHE_DTYPES[made_for]:
        raise FatalError(
            "QuantizationMismatch",
            f"--kv-cache-dtype (engine.kvCacheDtype) is {flag}, but the checkpoint was made for "
            f"{made_for} (kv_cache_scheme in its quantization_config). Set it to {made_for} or to "
            "auto, which keeps keys and values in the model's dtype.",
        )


def verify_tensor_parallel(config: ModelConfig, size: int) -> None:
    """Raises FatalError InvalidFlags for a number of ranks that cannot divide the model."""

    def divides(count: int) -> bool:
        few, many = sorted((count, config.num_kv_heads))
        return not (config.num_heads % count or many % few or config.intermediate_size % count)

    if not divides(size):
        counts = [str(count) for count in range(1, config.num_heads + 1) if divides(count)]
        raise FatalError(
            "InvalidFlags",
            f"--tensor-parallel-size (engine.tensorParallelSize) is {size}; it must divide the "
            f"model's {config.num_heads} attention heads and intermediate_size "
            f"{config.intermediate_size}, and divide its {config.num_kv_heads} KV heads or be a "
            f"multiple of them. Set it to one of: {', '.join(counts)}.",
        )
