"""Prompts of models that fill in the middle: their markers stand around what is there already."""

from __future__ import annotations

import re
from collections.abc import Callable

# Each needs all of its markers as tokens. The last text is where the model goes on.
FORMATS = (
    # Qwen2.5-Coder and Qwen3, CodeGemma, Granite 3.3 and 4.
    "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",
    # StarCoder, Granite Code.
    "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>",
    # DeepSeek-Coder, DeepSeek V2 and V3.
    "<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>",
    # CodeLlama.
    "▁<PRE>{prefix}▁<SUF>{suffix}▁<MID>",
    # Codestral, Devstral.
    "[SUFFIX]{suffix}[PREFIX]{prefix}",
)
_PLACES = re.compile(r"{prefix}|{suffix}")


def find_infill_format(token_to_id: Callable[[str], int | None]) -> str | None:
    """The format whose markers a vocabulary has, with places {prefix} and {suffix}; else None."""
    for text in FORMATS:
        markers = [marker for marker in _PLACES.split(text) if marker]
        if all(token_to_id(marker) is not None for marker in markers):
            return text
    return None
