"""Flags of every command that runs an engine ↔ EngineConfig, field by field.

The flags carry vLLM's names. With those of `server.flags` they are the contract with the operator,
which renders them.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from pagoda_runtime.config import KV_CACHE_DTYPES, SUPPORTED_DTYPES, EngineConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.flags import Flags, fraction, integer, positive_seconds, text_value
from pagoda_runtime.platforms import PLATFORMS
from pagoda_runtime.sampling_params import MAX_SEED

DTYPES = ("auto", *SUPPORTED_DTYPES)
DEVICES = ("auto", *sorted(PLATFORMS))
QUANTIZATIONS = (
    *("none", "awq", "gptq", "fp8", "int8", "int4", "exl2", "compressed-tensors", "gguf"),
)
GENERATION_CONFIGS = ("auto", "none")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    flags = Flags(parser, "model")
    flags.group.add_argument(
        "model_argument",
        metavar="MODEL",
        nargs="?",
        type=text_value,
        help="a folder in Hugging Face layout, a GGUF file, hf://org/name, org/name, or a "
        "folder of https://, s3:// or gs://, or oci://host/repository",
    )
    flags.group.add_argument("--model", type=text_value, help="the same as MODEL")
    flags.add(
        "--revision",
        shown="main",
        help="branch, tag or commit of an hf:// model; tag or digest of oci://",
    )
    flags.add("--dtype", choices=DTYPES, help="of the weights; auto is the checkpoint's")
    flags.add(
        "--quantization",
        choices=QUANTIZATIONS,
        help="format of the weights; absent is what the checkpoint says, none is no quantization, "
        "fp8, int8 and int4 also round an unquantized checkpoint when it is loaded; absent or "
        "gguf leaves a GGUF file its blocks",
    )
    flags.add(
        "--generation-config",
        choices=GENERATION_CONFIGS,
        help="auto takes the defaults of requests from the model's generation_config.json, none "
        "does not",
    )
    flags.add(
        "--max-model-len",
        type=integer(2),
        shown="what the model and memory allow",
        help="tokens of the context, prompt and answer together",
    )
    flags.add("--seed", type=integer(-MAX_SEED - 1, MAX_SEED), help="of requests without one")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    flags = Flags(parser, "engine")
    flags.add("--device", choices=DEVICES, help="auto is cuda where there is one, else cpu")
    flags.add(
        "--tensor-parallel-size",
        type=integer(1, 1024),
        help="ranks that divide the model, a GPU each; on a CPU processes",
    )
    flags.add("--max-num-seqs", type=integer(1, 65536), help="requests that run at once")
    flags.add(
        "--max-num-waiting",
        type=integer(0),
        help="requests that may wait; one more is answered with 429",
    )
    flags.add(
        "--max-num-batched-tokens", type=integer(1), help="tokens of one step, over all requests"
    )
    flags.add(
        "--long-prefill-token-threshold",
        type=integer(1),
        help="prompt tokens of a step in which others decode; less is smoother for them and slower "
        "for long prompts",
    )
    flags.add(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="plan the next step while one runs",
    )
    flags.add(
        "--enforce-eager",
        action="store_true",
        help="on a GPU: no CUDA graphs; less memory, a quicker start, slower decoding",
    )
    flags.add(
        "--deterministic",
        action="store_true",
        help="same bits for a request whatever the batch, preemptions and cache hits; slower",
    )
    flags.add(
        "--num-threads",
        type=integer(1, 4096),
        shown="the cores it may use",
        help="CPU threads of the engine",
    )
    flags.add(
        "--stall-seconds",
        type=positive_seconds,
        help="seconds without a step, while work is queued, until /health is 503",
    )
    flags.add(
        "--collective-timeout-seconds",
        type=positive_seconds,
        help="seconds that a rank may take for a step until the engine ends",
    )


def add_cache_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Args: defaults: of fields of EngineConfig that have another one in this command."""
    flags = Flags(parser, "KV cache", **defaults)
    flags.add(
        "--kv-cache-dtype",
        choices=("auto", *KV_CACHE_DTYPES),
        help="auto is the model's dtype; the others, 8 bits, hold almost twice the tokens; fp8 is "
        "fp8_e4m3",
    )
    flags.add("--block-size", type=integer(1, 1024), help="tokens of a block")
    flags.add(
        "--gpu-memory-utilization",
        type=fraction,
        help="part of the GPU's memory that the engine may use, above 0 to 1",
    )
    flags.add(
        "--kv-cache-memory-bytes",
        type=integer(1),
        shown="a quarter of the free memory on a CPU",
        help="bytes of the cache, for each rank",
    )
    flags.add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="keep the blocks of past prompts for requests that begin alike",
    )


def to_engine_config(args: argparse.Namespace) -> EngineConfig:
    """The config of parsed flags. Raises FatalError InvalidFlags if there is not one model."""
    values = vars(args)
    if args.model_argument is not None and args.model not in (None, args.model_argument):
        raise FatalError(
            "InvalidFlags",
            f"MODEL is {args.model_argument!r} and --model is {args.model!r}; give one of them.",
        )
    values["model"] = args.model_argument or args.model
    if values["model"] is None:
        raise FatalError("InvalidFlags", "no model is given: name it as MODEL, or --model MODEL.")
    return EngineConfig(**{field.name: values[field.name] for field in fields(EngineConfig)})
