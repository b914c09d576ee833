"""Token ids to text that may be shown at once, one request at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pagoda_runtime.sampling_params import SamplingParams
from pagoda_runtime.tokenizer.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Prompt tokens that the first new token is decoded with, so that it keeps its leading space.
NUM_CONTEXT_TOKENS = 5
# Where they are looked for; a prompt may end with several tokens that give no text.
NUM_SEARCHED_TOKENS = 64
# A character has at most 4 bytes, and so at most 4 tokens. What is no character after many more
# never becomes one, and waiting for it would decode an ever longer tail at every token.
MAX_UNDECODED_TOKENS = 16


NO_IDS: frozenset[int] = frozenset()


@lru_cache(16)
def _silent_ids(
    special: frozenset[int], shown: frozenset[int], others: tuple[int, ...]
) -> frozenset[int]:
    """One set for all choices of a request; a model may have thousands of special tokens."""
    return (special - shown).union(others)


class IncrementalDetokenizer:
    """Turns pushed token ids into text, and ends it at the first stop string.

    Text is held back while it may still change: bytes of an unfinished character, and whatever may
    be the beginning of a stop string. Of several stop strings the one that is complete first wins;
    it and all that follows is dropped, or all that follows it alone (include_stop_str_in_output).
    One that is complete before min_tokens are there is text like any other. How tokens are grouped
    into pushes makes no difference. Stop token ids of the sampling parameters give no text, unless
    what stopped it is to be in the output.

    Decoding token by token would lose spaces (sentencepiece drops one at the start) and characters
    that span tokens; so each decode starts some tokens back, and what was known is cut off. Most
    tokens are spared it: behind a whole character their text is a piece that the tokenizer knows.

    Args:
        tokenizer: decodes ids to text.
        sampling_params: stop, stop_token_ids, include_stop_str_in_output, min_tokens and
            skip_special_tokens are used.
        prompt_token_ids: the prompt that the text continues; without it the text begins as a
            text of its own, and a sentencepiece tokenizer drops its leading space.
        eos_token_ids: the model's end tokens. Unless they are ignored, they give no text either,
            as special tokens do; some vocabularies have them as ordinary ones.
        num_characters_before: that the text has before it continues: an echo of the prompt.
        shown_special_ids: special tokens that give text in any case.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling_params: SamplingParams,
        *,
        prompt_token_ids: Sequence[int] = (),
        eos_token_ids: Sequence[int] = (),
        num_characters_before: int = 0,
        shown_special_ids: frozenset[int] = NO_IDS,
    ) -> None:
        self.stopped_by: str | None = None
        """The stop string that ended the text."""
        self.num_tokens = 0
        """Tokens so far; what comes behind the one that completed a stop string is not counted."""
        self.num_decoded = num_characters_before
        """Characters so far, held ones included: where the text of the next token begins. The
        tokens of one character all begin where it begins."""
        self.num_shown = num_characters_before
        """Characters that were returned so far."""
        self._tokenizer = tokenizer
        self._stop = sampling_params.stop
        self._min_tokens = sampling_params.min_tokens
        self._shows_stop = sampling_params.include_stop_str_in_output
        skips = sampling_params.skip_special_tokens
        special = tokenizer.all_special_ids if skips else NO_IDS
        ends = eos_token_ids if skips and not sampling_params.ignore_eos else ()
        stops = () if self._shows_stop else sampling_params.stop_token_ids
        self._silent_ids = _silent_ids(special, shown_special_ids, (*ends, *stops))
        # The window: ids[:num_known] give known_text, the rest is not shown yet.
        searched = prompt_token_ids[-NUM_SEARCHED_TOKENS:]
        self._ids = [i for i in searched if i not in self._silent_ids][-NUM_CONTEXT_TOKENS:]
        self._known_text: str | None = self._decode(self._ids)
        """None if nobody asked for it yet."""
        if self._known_text.endswith(REPLACEMENT):
            # The prompt ends, or the window begins and ends, within a character.
            self._ids, self._known_text = [], ""
        self._num_known = len(self._ids)
        self._is_broken = False
        """Whether the window begins with what is no character."""
        self._held = ""
        """Decoded text that may be the beginning of a stop string."""

    @property
    def is_certain(self) -> bool:
        """Whether all that was pushed is returned, or dropped by a stop string."""
        return not self._held and len(self._ids) == self._num_known

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; return the text that is certain now. Empty after a stop string."""
        shown = ""
        # One by one, so that the text does not depend on how a slow reader's tokens were merged.
        for token_id in token_ids:
            if self.stopped_by is not None:
                break
            self.num_tokens += 1
            if token_id in self._silent_ids:
                continue
            new_text = self._advance(token_id)
            if new_text:
                shown += self._cut(new_text) if self._stop else new_text
        self.num_shown += len(shown)
        return shown

    def finish(self) -> str:
        """No more tokens come: return what was held back."""
        if self.stopped_by is not None:
            return ""
        rest = "" if self._known_text is None else self._decode(self._ids)[len(self._known_text) :]
        self.num_decoded += len(rest)
        text = self._cut(rest)
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        self._ids, self._known_text, self._num_known = [], "", 0
        self.num_shown += len(text)
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        # What is to be skipped is not among them.
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""

    def _advance(self, token_id: int) -> str:
        """The text that this token completes; the window moves on only at a whole character."""
        ids = self._ids
        if ids and len(ids) == self._num_known and not self._is_broken:
            piece = self._tokenizer.piece(token_id)
            if piece:
                self._ids, self._num_known, self._known_text = [token_id], 1, None
                self.num_decoded += len(piece)
                return piece
        if self._known_text is None:
            self._known_text = self._decode(ids)
        num_known_characters = len(self._known_text)
        ids.append(token_id)
        text = self._decode(ids)
        is_whole = len(text) > num_known_characters and not text.endswith(REPLACEMENT)
        if not is_whole and len(ids) - self._num_known < MAX_UNDECODED_TOKENS:
            return ""
        self._is_broken = not is_whole
        del ids[: self._num_known]
        self._num_known = len(ids)
        self._known_text = self._decode(ids)
        new_text = text[num_known_characters:]
        self.num_decoded += len(new_text)
        return new_text

    def _cut(self, new_text: str) -> str:
        """Add text behind the held one; return what no stop string can claim."""
        text = self._held + new_text
        # The one that ends first, and of those the longest; each must end in the new text, for in
        # the held one it was complete too early.
        found = [
            (begin + len(s), -len(s), s)
            for s in self._stop
            if s in text
            and self.num_tokens >= self._min_tokens
            and (begin := text.find(s, max(0, len(self._held) + 1 - len(s)))) >= 0
        ]
        if found:
            end, minus_length, self.stopped_by = min(found)
            self._held = ""
            return text[: end if self._shows_stop else end + minus_length]
        begin = find_beginning(text, self._stop)
        self._held = text[begin:]
        return text[:begin]


def find_beginning(text: str, markers: Sequence[str], first: int = 0) -> int:
    """Where the longest end of a text begins, from first on, that a marker may begin with."""
    longest = max(map(len, markers), default=1) - 1
    for begin in range(max(first, len(text) - longest), len(text)):
        if any(marker.startswith(text[begin:]) for marker in markers):
            return begin
    return len(text)
