"""Flags of the benchmarks, beside those of `pagoda serve`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from pagoda_runtime.flags import integer, number

positive_number = number(float, lambda value: value > 0, "a number above 0, or inf")
range_ratio = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
temperature = number(float, lambda value: 0 <= value <= 2, "a number from 0 to 2")


def add_number(
    group: argparse._ArgumentGroup,
    *names: str,
    text: str,
    parse: Callable[[str], float] | None = None,
    default: float | None = None,
    metavar: str = "N",
) -> None:
    """Add a flag with a number (by default a count) whose help ends with its default, if any."""
    shown = text if default is None else f"{text} (%(default)s)"
    group.add_argument(
        *names, type=parse or integer(1), default=default, metavar=metavar, help=shown
    )
