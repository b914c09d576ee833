"""Requests as a trace recorded them: when each came, and how long prompt and answer were.

A trace is a CSV file with a header, or a file of JSON objects, one a line. Of each kind of column
one name must be there; others are ignored:

    arrival   arrival_seconds (a number), timestamp (milliseconds), TIMESTAMP (date and time)
    input     input_tokens, input_length, ContextTokens
    output    output_tokens, output_length, GeneratedTokens

In JSON, hash_ids may name the content of each 512 tokens of the prompt: equal ids, equal tokens.
So the Azure LLM inference traces and the Mooncake traces can be used as they are published.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from pagoda_runtime.bench.flags import add_number, positive_number
from pagoda_runtime.bench.workloads.base import BenchRequest, Workload, random_token_ids
from pagoda_runtime.errors import RequestError

HASHED_TOKENS = 512
MAX_TOKENS = 10_000_000


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 <= seconds < float("inf"):
        raise ValueError
    return seconds


def _milliseconds(value: Any) -> float:
    return _seconds(value) / 1000


def _date(value: Any) -> float:
    moment = datetime.fromisoformat(str(value))
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _tokens(value: Any) -> int:
    tokens = int(value)
    if isinstance(value, (bool, float)) or not 1 <= tokens <= MAX_TOKENS:
        raise ValueError
    return tokens


@dataclass(frozen=True, slots=True)
class _Column:
    """One name that a kind of column may have."""

    name: str
    parse: Callable[[Any], Any]
    expected: str


_COUNT = f"a whole number 1–{MAX_TOKENS}"
ARRIVALS = (
    _Column("arrival_seconds", _seconds, "a number of seconds, 0 or more"),
    _Column("timestamp", _milliseconds, "a number of milliseconds, 0 or more"),
    _Column("TIMESTAMP", _date, "a date and time, as 2023-11-16 18:15:46.68"),
)
INPUTS = tuple(
    _Column(n, _tokens, _COUNT) for n in ("input_tokens", "input_length", "ContextTokens")
)
OUTPUTS = tuple(
    _Column(n, _tokens, _COUNT) for n in ("output_tokens", "output_length", "GeneratedTokens")
)


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    arrival_seconds: float
    """Since the trace's first request."""
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, max_rows: int | None = None) -> list[TraceRow]:
    """The first rows of a trace, in order of arrival.

    Raises: RequestError: the file cannot be read, has no rows, or one of them is broken.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [_parse_row(path, *item) for item in islice(_read_rows(path, file), max_rows)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(
            f"--dataset-path {path} cannot be read: {error}. Name a CSV file with a header, or one "
            "of JSON lines."
        ) from error
    if not rows and max_rows != 0:
        raise RequestError(f"--dataset-path {path} holds no requests. Name another file.")
    rows.sort(key=lambda row: row.arrival_seconds)
    first = rows[0].arrival_seconds if rows else 0.0
    return [
        TraceRow(row.arrival_seconds - first, row.input_tokens, row.output_tokens, row.hash_ids)
        for row in rows
    ]


def _read_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, columns) of every row."""
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, row
        return
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _line_error(path, number, f"no JSON object: {error}") from error
        if not isinstance(row, dict):
            raise _line_error(path, number, f"{line.strip()[:80]!r} is no JSON object")
        yield number, row


def _parse_row(path: Path, number: int, row: Mapping[str, Any]) -> TraceRow:
    def parse(columns: Sequence[_Column]) -> Any:
        column = next((c for c in columns if row.get(c.name) is not None), None)
        if column is None:
            names = ", ".join(c.name for c in columns)
            found = ", ".join(str(name) for name in row) or "nothing"
            raise _line_error(path, number, f"none of the columns {names}; it has {found}")
        try:
            return column.parse(row[column.name])
        except (ValueError, TypeError):
            problem = f"{column.name} is {row[column.name]!r}; it must be {column.expected}"
            raise _line_error(path, number, problem) from None

    hash_ids = row.get("hash_ids") or ()
    if not isinstance(hash_ids, (list, tuple)) or not all(type(i) is int for i in hash_ids):
        raise _line_error(path, number, f"hash_ids is {hash_ids!r}; it must be a list of integers")
    return TraceRow(parse(ARRIVALS), parse(INPUTS), parse(OUTPUTS), tuple(hash_ids))


def _line_error(path: Path, number: int, problem: str) -> RequestError:
    return RequestError(f"{path}, line {number}: {problem}. Correct or remove the line.")


def make_prompt(row: TraceRow, vocab_size: int, rng: random.Random) -> list[int]:
    """Tokens of the row's length; those of a hash id depend on the id alone."""
    token_ids: list[int] = []
    for hash_id in row.hash_ids[: -(-row.input_tokens // HASHED_TOKENS)]:
        token_ids += random_token_ids(HASHED_TOKENS, vocab_size, random.Random(hash_id))
    del token_ids[row.input_tokens :]
    return token_ids + random_token_ids(row.input_tokens - len(token_ids), vocab_size, rng)


def _add_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset-path",
        type=Path,
        metavar="FILE",
        help="trace-file: CSV or JSON lines with the arrival, input tokens and output tokens of "
        "each request",
    )
    text = "trace-file: times as fast as it was recorded; inf sends all at once"
    add_number(group, "--trace-speed", parse=positive_number, default=1.0, metavar="X", text=text)


def _make_requests(
    args: argparse.Namespace, vocab_size: int, rng: random.Random
) -> list[BenchRequest]:
    if args.dataset_path is None:
        raise RequestError("--dataset-name trace-file needs --dataset-path FILE.")
    return [
        BenchRequest(
            prompt_token_ids=make_prompt(row, vocab_size, rng),
            output_len=row.output_tokens,
            arrival_seconds=row.arrival_seconds / args.trace_speed,
        )
        for row in read_trace(args.dataset_path, args.num_prompts)
    ]


TRACE_FILE = Workload(
    "trace-file", "lengths and arrivals of a recorded trace", _add_flags, _make_requests
)
