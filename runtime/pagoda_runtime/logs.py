"""One form of log lines for every process: time, level, logger, and the request if there is one."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that this task answers."""

# The names that our loggers begin with.
_OWN = ("pagoda", "pagoda_runtime", "pagoda_kernels")
_FORMAT = "%(asctime)s %(levelname)s %(name)s%(request)s: %(message)s"


def configure_logging(level: str) -> None:
    """Log to stderr from this level on, what is below info only of Pagoda itself: a compiler that
    tells all would take minutes. uvicorn's own lines come only where something is wrong."""
    number = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_add_request)
    logging.basicConfig(
        level=max(number, logging.INFO), format=_FORMAT, handlers=[handler], force=True
    )
    for name in _OWN:
        logging.getLogger(name).setLevel(number)
    logging.getLogger("uvicorn").setLevel(max(number, logging.WARNING))


def _add_request(record: logging.LogRecord) -> bool:
    found = request_id.get()
    record.request = "" if found is None else f" [{found}]"
    return True


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Log how long a phase of the start took."""
    started = time.monotonic()
    yield
    logging.getLogger("pagoda.engine").info("%s took %.2f s", phase, time.monotonic() - started)
