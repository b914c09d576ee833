"""The commands of a guide: its fenced blocks of bash, heading by heading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(
    r"^## (?P<heading>[^\n]+)$"
    r"|^(?P<mark><!-- not run by the tests: [^\n]+ -->\n)?```bash\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block under a heading ("" before the first); `is_run`: not marked otherwise."""

    heading: str
    text: str
    is_run: bool


def blocks(guide: Path) -> Iterator[Block]:
    heading = ""
    for found in BLOCK.finditer(guide.read_text()):
        if found["heading"]:
            heading = found["heading"]
        else:
            yield Block(heading, found["text"], not found["mark"])
