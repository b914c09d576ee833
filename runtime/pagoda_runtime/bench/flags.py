"""Types of the benchmarks' flags, beside those of `pagoda serve`."""

from __future__ import annotations

import argparse


def positive_number(text: str) -> float:
    """A type for argparse: above 0; `inf` is allowed."""
    value = _to_float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, or inf")
    return value


def range_ratio(text: str) -> float:
    """A type for argparse: 0 to below 1."""
    value = _to_float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def temperature(text: str) -> float:
    """A type for argparse: 0 to 2."""
    value = _to_float(text)
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2")
    return value


def _to_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
