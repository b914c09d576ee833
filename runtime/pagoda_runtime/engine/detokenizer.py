"""Token ids to text that may be shown at once, one request at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from pagoda_runtime.sampling_params import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Prompt tokens that the first new token is decoded with, so that it keeps its leading space.
NUM_CONTEXT_TOKENS = 5
# A character has at most 4 bytes, and so at most 4 tokens. What is no character after many more
# never becomes one, and waiting for it would decode an ever longer tail at every token.
MAX_UNDECODED_TOKENS = 16


class Decoder(Protocol):
    """What is asked of a tokenizer (`models.tokenizer.Tokenizer`)."""

    @property
    def all_special_ids(self) -> Iterable[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...


class IncrementalDetokenizer:
    """Turns pushed token ids into text, and ends it at the first stop string.

    Text is held back while it may still change: bytes of an unfinished character, and whatever may
    be the beginning of a stop string. Of several stop strings the one that is complete first wins;
    it and all that follows is dropped. How tokens are grouped into pushes makes no difference.
    Stop token ids of the sampling parameters give no text.

    Decoding token by token would lose spaces (sentencepiece drops one at the start) and characters
    that span tokens; so each decode starts some tokens back, and what was known is cut off.

    Args:
        tokenizer: decodes ids to text.
        sampling_params: stop, stop_token_ids and skip_special_tokens are used.
        prompt_token_ids: the prompt that the text continues; without it the text begins as a
            text of its own, and a sentencepiece tokenizer drops its leading space.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        sampling_params: SamplingParams,
        *,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self.stopped_by: str | None = None
        """The stop string that ended the text."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = sampling_params.skip_special_tokens
        self._stop = sampling_params.stop
        self._silent_ids = set(sampling_params.stop_token_ids)
        if self._skip_special_tokens:
            self._silent_ids.update(tokenizer.all_special_ids)
        # The window: ids[:num_known] give known_text, the rest is not shown yet.
        self._ids = [i for i in prompt_token_ids if i not in self._silent_ids][-NUM_CONTEXT_TOKENS:]
        self._known_text = self._decode(self._ids)
        if self._known_text.endswith(REPLACEMENT):
            # The prompt ends, or the window begins and ends, within a character.
            self._ids, self._known_text = [], ""
        self._num_known = len(self._ids)
        self._held = ""
        """Decoded text that may be the beginning of a stop string."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; return the text that is certain now. Empty after a stop string."""
        if self.stopped_by is not None:
            return ""
        shown = []
        # One by one, so that the text does not depend on how a slow reader's tokens were merged.
        for token_id in token_ids:
            if token_id in self._silent_ids:
                continue
            shown.append(self._cut(self._advance(token_id)))
            if self.stopped_by is not None:
                break
        return "".join(shown)

    def finish(self) -> str:
        """No more tokens come: return what was held back."""
        if self.stopped_by is not None:
            return ""
        text = self._cut(self._decode(self._ids)[len(self._known_text) :])
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        self._ids, self._known_text, self._num_known = [], "", 0
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens) if ids else ""

    def _advance(self, token_id: int) -> str:
        """The text that this token completes; the window moves on only at a whole character."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        num_undecoded = len(self._ids) - self._num_known
        is_whole = len(text) > len(self._known_text) and not text.endswith(REPLACEMENT)
        if not is_whole and num_undecoded < MAX_UNDECODED_TOKENS:
            return ""
        new_text = text[len(self._known_text) :]
        self._ids = self._ids[self._num_known :]
        self._num_known = len(self._ids)
        self._known_text = self._decode(self._ids)
        return new_text

    def _cut(self, new_text: str) -> str:
        """Add text behind the held one; return what no stop string can claim."""
        text = self._held + new_text
        # The one that ends first, and of those the longest.
        found = [(text.find(s) + len(s), -len(s), s) for s in self._stop if s in text]
        if found:
            end, minus_length, self.stopped_by = min(found)
            self._held = ""
            return text[: end + minus_length]
        num_held = self._num_ambiguous(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def _num_ambiguous(self, text: str) -> int:
        """Length of the longest end of text that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
