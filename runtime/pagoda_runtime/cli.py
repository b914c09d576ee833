"""The command `pagoda`: flags ↔ ServerConfig and EngineConfig, field by field.

The flags carry vLLM's names. They are the contract with the operator, which renders them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any, NoReturn

from pagoda_runtime.config import EngineConfig, ServerConfig
from pagoda_runtime.errors import FatalError
from pagoda_runtime.last_words import write_last_words
from pagoda_runtime.sampling_params import MAX_SEED

# Exit status of a command line that is wrong, as argparse and the shells have it.
EXIT_INVALID_FLAGS = 2

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("none", "awq", "gptq", "fp8", "int8", "int4", "exl2", "compressed-tensors")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2", "int8")
LOG_LEVELS = ("debug", "info", "warning", "error")


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that raises FatalError InvalidFlags where argparse would exit."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise FatalError("InvalidFlags", f"{message}. See `{self.prog} --help`.")


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type for argparse: an integer from low to high, both included."""
    expected = f"an integer of at least {low}" if high is None else f"an integer {low}–{high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


def seconds(text: str) -> float:
    """A type for argparse: a finite number of seconds, 0 included."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return value


def positive_seconds(text: str) -> float:
    """A type for argparse: a finite number of seconds above 0."""
    value = seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError("'0' is not a number of seconds above 0")
    return value


def fraction(text: str) -> float:
    """A type for argparse: above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def text_value(text: str) -> str:
    """A type for argparse: any text but the empty one."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty")
    return text


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "model_argument",
        metavar="MODEL",
        nargs="?",
        type=text_value,
        help="a folder in Hugging Face layout, hf://org/name, or org/name",
    )
    group.add_argument("--model", type=text_value, help="the same as MODEL")
    group.add_argument("--revision", help="branch, tag or commit of an hf:// model (main)")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights; auto is the checkpoint's"
    )
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="format of the weights; absent is what the checkpoint says, none is no quantization, "
        "int8 also rounds an unquantized checkpoint when it is loaded (CPU with AVX512-bf16)",
    )
    group.add_argument(
        "--max-model-len",
        type=integer(2),
        help="tokens of the context, prompt and answer together (what the model and memory allow)",
    )
    group.add_argument(
        "--seed",
        type=integer(-MAX_SEED - 1, MAX_SEED),
        default=0,
        help="of requests without one (0)",
    )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="auto is cuda where there is one, else cpu",
    )
    group.add_argument(
        "--tensor-parallel-size",
        type=integer(1, 1024),
        default=1,
        help="GPUs that share the model (1)",
    )
    group.add_argument(
        "--max-num-seqs",
        type=integer(1, 65536),
        default=256,
        help="requests that run at once (256)",
    )
    group.add_argument(
        "--max-num-waiting",
        type=integer(0),
        default=1024,
        help="requests that may wait; one more is answered with 429 (1024)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=integer(1),
        help="tokens of one step, over all requests (512 on a CPU, 2048 on a GPU)",
    )
    group.add_argument(
        "--long-prefill-token-threshold",
        type=integer(1),
        help="prompt tokens of a step in which others decode; less is smoother for them and slower "
        "for long prompts (28 on a CPU, 2048 on a GPU)",
    )
    group.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="plan the next step while one runs (off)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="same bits for a request whatever the batch, preemptions and cache hits; slower (off)",
    )
    group.add_argument(
        "--num-threads",
        type=integer(1, 4096),
        help="CPU threads of the engine (the cores it may use)",
    )
    group.add_argument(
        "--stall-seconds",
        type=positive_seconds,
        default=120.0,
        help="seconds without a step, while work is queued, until /health is 503 (120)",
    )


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("KV cache")
    group.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="auto is the model's dtype",
    )
    group.add_argument(
        "--block-size", type=integer(1, 1024), help="tokens of a block (28 on a CPU, 16 on a GPU)"
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=fraction,
        default=0.9,
        help="part of the GPU's memory that the engine may use, above 0 to 1 (0.9)",
    )
    group.add_argument(
        "--kv-cache-memory-bytes",
        type=integer(1),
        help="bytes of the cache (a quarter of the free memory on a CPU)",
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the blocks of past prompts for requests that begin alike (on)",
    )


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", type=text_value, default="0.0.0.0", help="address to listen on (0.0.0.0)"
    )
    group.add_argument(
        "--port", type=integer(0, 65535), default=8000, help="port; 0 takes a free one (8000)"
    )
    group.add_argument(
        "--admin-port",
        type=integer(0, 65535),
        help="port of /reset_prefix_cache; 0 takes a free one (none: there is no admin port)",
    )
    group.add_argument(
        "--admin-host",
        type=text_value,
        default="127.0.0.1",
        help="address of the admin port; not one that clients reach (127.0.0.1)",
    )
    group.add_argument(
        "--served-model-name",
        nargs="+",
        action="extend",
        type=text_value,
        metavar="NAME",
        help="names that requests may use; answers show the first (MODEL as given)",
    )
    group.add_argument(
        "--api-key",
        nargs="+",
        action="extend",
        type=text_value,
        metavar="KEY",
        help="keys of which /v1/* asks for one as bearer token (none: everybody may)",
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        type=text_value,
        help="Jinja file in place of the model's template",
    )
    group.add_argument(
        "--drain-delay-seconds",
        type=seconds,
        default=5.0,
        help="seconds after SIGTERM in which new requests are still served (5)",
    )
    group.add_argument(
        "--drain-seconds",
        type=seconds,
        default=30.0,
        help="seconds that running requests then have to finish (30)",
    )
    group.add_argument(
        "--log-level", choices=LOG_LEVELS, default="info", help="least level that is logged (info)"
    )


def build_serve_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add all flags of `pagoda serve`."""
    add_model_flags(parser)
    add_engine_flags(parser)
    add_cache_flags(parser)
    add_server_flags(parser)
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
    rest = {f.name: values[f.name] for f in fields(ServerConfig) if f.name != "engine"}
    return ServerConfig(engine=to_engine_config(args), **rest)


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
        config = to_server_config(args) if args.command == "serve" else None
    except FatalError as error:
        write_last_words(error.reason, error.message)
        return EXIT_INVALID_FLAGS
    if config is None:
        from pagoda_runtime import batch, bench, convert

        runs = {"bench": bench.run, "convert": convert.run, "run-batch": batch.run}
        return runs[args.command](args)
    from pagoda_runtime.server.run import serve

    try:
        return serve(config)
    except FatalError as error:
        write_last_words(error.reason, error.message)
        return 1


if __name__ == "__main__":
    sys.exit(main())
