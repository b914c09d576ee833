"""`pagoda bench`: how fast an engine or a server is.

`latency` and `throughput` run the engine offline; `serve` loads any OpenAI-compatible server.
`workloads` makes prompts and arrivals, `load` sends them in time, `endpoint` measures one request
over `client` and `http1`, `server` finds the server and its model, `summary` makes figures of the
records.
"""

from __future__ import annotations

import argparse
import sys

from pagoda_runtime.bench import offline, serve
from pagoda_runtime.errors import PagodaError, exit_status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `pagoda bench` to its parser."""
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, help_text, add in (
        ("latency", "seconds of one batch, offline", offline.add_latency_arguments),
        ("throughput", "requests and tokens per second, offline", offline.add_throughput_arguments),
        ("serve", "load an OpenAI-compatible server and measure it", serve.add_arguments),
    ):
        add(commands.add_parser(name, help=help_text, description=help_text))


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that the flags name; returns the exit status, with errors on stderr."""
    try:
        return serve.run(args) if args.benchmark == "serve" else offline.run(args)
    except PagodaError as error:
        print(f"pagoda bench {args.benchmark}: {error}", file=sys.stderr)
        return exit_status(error)
    except KeyboardInterrupt:
        # As the shells have it for SIGINT.
        return 130
