"""`pagoda pull MODEL`: fetch a model into the cache, where `pagoda serve` finds it."""

from __future__ import annotations

import argparse
import sys

from pagoda_runtime.models.source import resolve_model

STEP_PERCENT = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pagoda pull` to its parser."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hf://org/name, org/name, oci://host/repository, or a folder of https://, s3:// or gs://",
    )
    parser.add_argument(
        "--revision", help="branch, tag or commit (main); tag or digest of oci:// (latest)"
    )


def run(args: argparse.Namespace) -> int:
    """Fetch the model, and print its folder. Returns the exit status.

    Raises: FatalError: ModelNotFound, ModelAccessDenied, SourceUnreachable or DiskFull.
    """
    print(resolve_model(args.model, args.revision, Progress()))
    return 0


class Progress:
    """Tells of a download in a few lines: a log has no bar."""

    def __init__(self) -> None:
        self._told = -STEP_PERCENT

    def __call__(self, phase: str, percent: float, bytes_per_second: float) -> None:
        """The part that is there, as `models.source.OnProgress`."""
        if percent < self._told + STEP_PERCENT:
            return
        self._told = int(percent // STEP_PERCENT) * STEP_PERCENT
        speed = f", {bytes_per_second / 1e6:.1f} MB/s" if bytes_per_second else ""
        print(f"{phase}: {percent:.0f} %{speed}", file=sys.stderr, flush=True)
