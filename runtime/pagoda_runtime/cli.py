"""The command `pagoda`: its subcommands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from pagoda_runtime import batch, bench, chat, convert, pull
from pagoda_runtime.errors import FatalError, exit_status
from pagoda_runtime.flags import FlagParser
from pagoda_runtime.last_words import write_last_words
from pagoda_runtime.models.check import verify_start
from pagoda_runtime.server import flags as server_flags


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = FlagParser(prog="pagoda", description="Serve large language models.")
    parser.add_argument("--version", action="version", version=f"pagoda {version('pagoda-serve')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = "serve a model through an OpenAI-compatible API"
    server_flags.add_arguments(commands.add_parser("serve", help=serve, description=serve))
    talk = "talk with an OpenAI-compatible server"
    chat.add_arguments(commands.add_parser("chat", help=talk, description=talk))
    folder = "make a folder in Hugging Face layout from a GGUF file"
    convert.add_arguments(commands.add_parser("convert", help=folder, description=folder))
    fetch = "fetch a model into the cache"
    pull.add_arguments(commands.add_parser("pull", help=fetch, description=fetch))
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
            runs = {
                "bench": bench.run,
                "chat": chat.run,
                "convert": convert.run,
                "pull": pull.run,
                "run-batch": batch.run,
            }
            return runs[args.command](args)
        config = server_flags.to_server_config(args)
        verify_start(config.engine)
        from pagoda_runtime.server.run import serve

        return serve(config)
    except FatalError as error:
        write_last_words(error.reason, error.message)
        return exit_status(error)


if __name__ == "__main__":
    sys.exit(main())
