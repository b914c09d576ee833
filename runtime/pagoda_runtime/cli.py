"""The command `pagoda`: flags ↔ ServerConfig and EngineConfig, field by field.

The flags carry vLLM's names. They are the contract with the operator, which renders them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from itertools import chain
from typing import Any

from pagoda_runtime.config import SUPPORTED_DTYPES, EngineConfig, ServerConfig
from pagoda_runtime.errors import FatalError, exit_status
from pagoda_runtime.flags import (
    DEFAULTS,
    FlagParser,
    Flags,
    fraction,
    integer,
    origins,
    positive_seconds,
    seconds,
    text_value,
    texts,
)
from pagoda_runtime.keys import environment_keys
from pagoda_runtime.last_words import write_last_words
from pagoda_runtime.models.check import verify_start
from pagoda_runtime.platforms import PLATFORMS
from pagoda_runtime.sampling_params import MAX_SEED

DTYPES = ("auto", *SUPPORTED_DTYPES)
DEVICES = ("auto", *sorted(PLATFORMS))
QUANTIZATIONS = ("none", "awq", "gptq", "fp8", "int8", "int4", "exl2", "compressed-tensors")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2", "int8")
GENERATION_CONFIGS = ("auto", "none")
LOG_LEVELS = ("debug", "info", "warning", "error")
# What has a meaning only where there are allowed origins.
CORS_DETAILS = ("allow_credentials", "allowed_methods", "allowed_headers")
# Of flags that take several values, and may come several times.
SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend", "type": text_value, "default": None}
_TEMPLATE_HELP = "Jinja file in place of the model's template"
CHAT_TEMPLATE: dict[str, Any] = {"metavar": "FILE", "type": text_value, "help": _TEMPLATE_HELP}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    flags = Flags(parser, "model")
    flags.group.add_argument(
        "model_argument",
        metavar="MODEL",
        nargs="?",
        type=text_value,
        help="a folder in Hugging Face layout, a GGUF file, hf://org/name, or org/name",
    )
    flags.group.add_argument("--model", type=text_value, help="the same as MODEL")
    flags.add("--revision", shown="main", help="branch, tag or commit of an hf:// model")
    flags.add("--dtype", choices=DTYPES, help="of the weights; auto is the checkpoint's")
    flags.add(
        "--quantization",
        choices=QUANTIZATIONS,
        help="format of the weights; absent is what the checkpoint says, none is no quantization, "
        "int8 also rounds an unquantized checkpoint when it is loaded (CPU with AVX512-bf16)",
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
    flags.add("--tensor-parallel-size", type=integer(1, 1024), help="GPUs that share the model")
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


def add_cache_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Args: defaults: of fields of EngineConfig that have another one in this command."""
    flags = Flags(parser, "KV cache", **defaults)
    flags.add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, help="auto is the model's dtype")
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
        help="bytes of the cache",
    )
    flags.add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="keep the blocks of past prompts for requests that begin alike",
    )


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    flags = Flags(parser, "server")
    flags.add("--host", type=text_value, help="address to listen on")
    flags.add("--port", type=integer(0, 65535), help="port; 0 takes a free one")
    flags.add(
        "--admin-port",
        type=integer(0, 65535),
        shown="none: there is no admin port",
        help="port of /reset_prefix_cache; 0 takes a free one",
    )
    flags.add(
        "--admin-host",
        type=text_value,
        help="address of the admin port; not one that clients reach",
    )
    flags.add(
        "--served-model-name",
        **SEVERAL,
        metavar="NAME",
        shown="MODEL as given",
        help="names that requests may use; answers show the first",
    )
    flags.add(
        "--api-key",
        **SEVERAL,
        metavar="KEY",
        shown="PAGODA_API_KEY, several between commas; without any key everybody may call",
        help="keys of which /v1/* asks for one as bearer token; `ps` shows what is given here",
    )
    flags.add(
        "--api-key-file",
        metavar="FILE",
        type=text_value,
        help="file with more keys, one a line, or folder of such files, as a mounted Secret is; "
        "changes hold within seconds",
    )
    flags.add("--chat-template", **CHAT_TEMPLATE)
    flags.add(
        "--max-body-bytes",
        type=integer(1024),
        shown="4 MiB, and 64 bytes for each token of the context",
        help="bytes of a request's body; a larger one is answered with 413",
    )
    flags.add(
        "--drain-delay-seconds",
        type=seconds,
        help="seconds after SIGTERM in which new requests are still served",
    )
    flags.add(
        "--drain-seconds", type=seconds, help="seconds that running requests then have to finish"
    )
    flags.add("--log-level", choices=LOG_LEVELS, help="least level that server and engine log")
    flags.add(
        "--disable-access-log",
        "--disable-uvicorn-access-log",
        action="store_true",
        help="do not log a line for each request; probes have one at level debug only",
    )


def add_browser_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of CORS. vLLM's users give each of them one JSON list."""
    flags = Flags(parser, "browsers (CORS)")
    flags.add(
        "--allowed-origins",
        **{**SEVERAL, "type": origins},
        metavar="ORIGIN",
        shown="none",
        help="origins of pages that may call this server, such as https://example.org, or *",
    )
    flags.add(
        "--allow-credentials", action="store_true", help="such pages may send cookies; not with *"
    )
    for name in ("--allowed-methods", "--allowed-headers"):
        flags.add(
            name,
            **{**SEVERAL, "type": texts},
            metavar="NAME",
            shown="*: all",
            help=f"{name.rpartition('-')[2]} that such pages may use",
        )


def build_serve_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add all flags of `pagoda serve`."""
    add_model_flags(parser)
    add_engine_flags(parser)
    add_cache_flags(parser)
    add_server_flags(parser)
    add_browser_flags(parser)
    return parser


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


def to_server_config(args: argparse.Namespace) -> ServerConfig:
    """The config of parsed flags. Raises FatalError InvalidFlags if there is not one model."""
    values = vars(args)
    for name in ("served_model_name", "api_key"):
        values[name] = tuple(values[name] or ())
    values["api_key"] += environment_keys(os.environ)
    for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
        values[name] = tuple(chain.from_iterable(values[name] or ())) or DEFAULTS[name]
    verify_origins(values)
    rest = {f.name: values[f.name] for f in fields(ServerConfig) if f.name != "engine"}
    return ServerConfig(engine=to_engine_config(args), **rest)


def verify_origins(values: Mapping[str, Any]) -> None:
    """Raises FatalError InvalidFlags where flags of CORS contradict each other."""
    origins = values["allowed_origins"]
    changed = [n for n in CORS_DETAILS if values[n] != DEFAULTS[n]]
    if changed and not origins:
        flag = f"--{changed[0].replace('_', '-')}"
        raise FatalError("InvalidFlags", f"{flag} means nothing without --allowed-origins.")
    if "*" in origins and values["allow_credentials"]:
        raise FatalError(
            "InvalidFlags",
            "--allow-credentials with --allowed-origins * would let every page act as its visitor; "
            "name the origins.",
        )


def parse_serve_args(argv: Sequence[str]) -> ServerConfig:
    """The config that `pagoda serve` with these arguments has. Raises FatalError InvalidFlags."""
    parser = build_serve_parser(FlagParser(prog="pagoda serve"))
    return to_server_config(parser.parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    from pagoda_runtime import batch, bench, convert

    parser = FlagParser(prog="pagoda", description="Serve large language models.")
    parser.add_argument("--version", action="version", version=f"pagoda {version('pagoda-serve')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = "serve a model through an OpenAI-compatible API"
    build_serve_parser(commands.add_parser("serve", help=serve, description=serve))
    folder = "make a folder in Hugging Face layout from a GGUF file"
    convert.add_arguments(commands.add_parser("convert", help=folder, description=folder))
    lines = "answer a file of requests in OpenAI's batch format"
    batch.add_arguments(commands.add_parser("run-batch", help=lines, description=lines))
    speed = "measure an engine or a server"
    bench.add_arguments(commands.add_parser("bench", help=speed, description=speed))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. FatalErrors become last words."""
    try:
        args = build_parser().parse_args(argv)
        if args.command != "serve":
            from pagoda_runtime import batch, bench, convert

            runs = {"bench": bench.run, "convert": convert.run, "run-batch": batch.run}
            return runs[args.command](args)
        config = to_server_config(args)
        verify_start(config.engine)
        from pagoda_runtime.server.run import serve

        return serve(config)
    except FatalError as error:
        write_last_words(error.reason, error.message)
        return exit_status(error)


if __name__ == "__main__":
    sys.exit(main())
