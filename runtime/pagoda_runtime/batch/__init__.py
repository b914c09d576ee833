"""`pagoda run-batch -i in.jsonl -o out.jsonl MODEL`: OpenAI's batch format, without a server.

`lines` reads the input, `results` keeps the output and knows what is done, `job` answers the lines
as the server's own routes do, so that every field means what it means over HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

from pagoda_runtime.config import ServerConfig
from pagoda_runtime.engine_flags import (
    add_cache_flags,
    add_engine_flags,
    add_model_flags,
    to_engine_config,
)
from pagoda_runtime.errors import PagodaError, exit_status
from pagoda_runtime.flags import Flags
from pagoda_runtime.logs import configure_logging
from pagoda_runtime.models.check import verify_start
from pagoda_runtime.server.flags import add_request_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pagoda run-batch` to its parser."""
    parser.add_argument(
        "-i",
        "--input-file",
        type=Path,
        required=True,
        metavar="FILE",
        help="a request per line: custom_id, method POST, url, body",
    )
    parser.add_argument(
        "-o",
        "--output-file",
        type=Path,
        required=True,
        metavar="FILE",
        help="gets a line for each; lines that it has already are not asked again",
    )
    add_request_flags(Flags(parser, "requests"))
    add_model_flags(parser)
    add_engine_flags(parser)
    add_cache_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the batch that the flags name; returns the exit status, with errors on stderr.

    0: every line has an answer or an error of its own. 1: the engine or the disk failed. 2: a flag,
    file or model is wrong. 128 + a signal's number: stopped. The same command continues.
    """
    # Here and not above: it takes the server's libraries with it.
    from pagoda_runtime.batch import job

    started = time.monotonic()
    try:
        config = _make_config(args)
        verify_start(config.engine)
        configure_logging(config.log_level)
        outcome = asyncio.run(job.run_until_signal(config, args.input_file, args.output_file))
    except PagodaError as error:
        print(f"pagoda run-batch: {error}", file=sys.stderr)
        return exit_status(error)
    if isinstance(outcome, signal.Signals):
        print("pagoda run-batch: stopped; the same command continues.", file=sys.stderr)
        return 128 + outcome
    print(
        f"{args.output_file}: {outcome.num_answers} answers and {outcome.num_errors} errors in "
        f"{time.monotonic() - started:.1f} s",
        file=sys.stderr,
    )
    return 0


def _make_config(args: argparse.Namespace) -> ServerConfig:
    return ServerConfig(
        engine=to_engine_config(args),
        served_model_name=tuple(args.served_model_name or ()),
        chat_template=args.chat_template,
        trust_request_chat_template=args.trust_request_chat_template,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        log_level=args.log_level,
        disable_access_log=True,
    )
