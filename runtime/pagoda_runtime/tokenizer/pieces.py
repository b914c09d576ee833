"""Which tokenizers write a token in the same way wherever it stands."""

from __future__ import annotations

import json
from typing import Any

# Decoders that look at one token alone, but for characters that several tokens spell in bytes, and
# for what they drop at the start of a text.
CONTEXT_FREE = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace"})


def decoder_kinds(decoder: Any) -> set[str]:
    """The names of a decoder and of its parts; none of none."""

    def kinds(state: dict[str, Any]) -> set[str]:
        return {state["type"]}.union(*map(kinds, state.get("decoders", ())))

    return set() if decoder is None else kinds(json.loads(decoder.__getstate__()))


def is_context_free(decoder: Any) -> bool:
    """Whether a token that is whole characters has one text behind any other whole character.

    So it is for byte-level and sentencepiece vocabularies. `decoder` is of the `tokenizers`
    library; a tokenizer without one writes spaces between its tokens.
    """
    return decoder is not None and _is_context_free(json.loads(decoder.__getstate__()))


def _is_context_free(state: dict[str, Any]) -> bool:
    match state["type"]:
        case "Sequence":
            return all(_is_context_free(part) for part in state["decoders"])
        case "Replace":
            # A longer pattern could be found across tokens that were fused before.
            return len(state["pattern"].get("String", "")) == 1
        case "Strip":
            return state["stop"] == 0
        case kind:
            return kind in CONTEXT_FREE
