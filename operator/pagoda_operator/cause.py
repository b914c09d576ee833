"""One cause of a service not being what its spec asks for, and what keeps its words steady."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What differs between two equal failures (times, ids, ports of the client) would be a write of the
# status at each.
_VARYING = re.compile(
    r"\d{4}-\d\d-\d\d[T ][\d:.,]+\S*|0x[0-9a-f]+|\(?pid \d+\)?|(?<=Process )\d+|[0-9a-f]{32,}"
    r"|(?<![\w-])[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|(?<=:)\d+(?=->)"
)


@dataclass(frozen=True, slots=True)
class Cause:
    """Why the service is not what its spec asks for; `is_stalled` if a person has to act."""

    reason: str
    message: str
    is_stalled: bool


def steady(text: str) -> str:
    """The text without what differs between two equal failures."""
    return _VARYING.sub("…", text)
