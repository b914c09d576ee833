"""What can be refused before anything is loaded: flags, paths and configs, without torch."""

from __future__ import annotations

from pagoda_runtime.config import EngineConfig
from pagoda_runtime.convert.cache import require_gguf
from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.config import SUPPORTED_DTYPES, ModelConfig
from pagoda_runtime.models.registry import load_model_config
from pagoda_runtime.models.source import local_path
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
    read_tokenizer_file(path)


def verify_supported(config: EngineConfig) -> None:
    """Raises FatalError InvalidFlags for flags that today's engine cannot serve on any device."""
    if config.tensor_parallel_size != 1:
        raise FatalError(
            "InvalidFlags",
            f"--tensor-parallel-size (engine.tensorParallelSize) is {config.tensor_parallel_size}; "
            "this version runs on one device only. Set it to 1.",
        )
    if config.kv_cache_dtype != "auto":
        raise FatalError(
            "InvalidFlags",
            f"--kv-cache-dtype (engine.kvCacheDtype) is {config.kv_cache_dtype}; this version "
            "keeps the KV cache in the model's dtype only. Set it to auto.",
        )
    if config.dtype not in ("auto", *SUPPORTED_DTYPES):
        raise FatalError(
            "InvalidFlags",
            f"--dtype (engine.dtype) is {config.dtype}; it must be auto, "
            f"{', '.join(SUPPORTED_DTYPES)}.",
        )


def verify_max_model_len(config: ModelConfig, max_model_len: int | None) -> None:
    """Raises FatalError InvalidFlags for a context that is longer than the model's."""
    limit = config.max_position_embeddings
    if max_model_len is not None and max_model_len > limit:
        raise FatalError(
            "InvalidFlags",
            f"--max-model-len (engine.maxModelLen) is {max_model_len}, but the model "
            f"reaches {limit} tokens (max_position_embeddings and rope). Give at most {limit}.",
        )
