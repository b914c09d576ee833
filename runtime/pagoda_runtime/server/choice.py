"""The text of one choice, and the tokens that it shows if logprobs were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagoda_runtime.ipc.messages import RequestDelta, TokenLogprobs
from pagoda_runtime.server.logprobs import ShownToken
from pagoda_runtime.tokenizer.detokenizer import IncrementalDetokenizer


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt as each choice begins with it."""

    text: str
    token_ids: Sequence[int]
    offsets: Sequence[int]
    """Where in the text each token begins; empty without logprobs."""

    def shown(self, prompt_logprobs: Sequence[TokenLogprobs]) -> list[ShownToken]:
        """The prompt's tokens. prompt_logprobs are those of the second and later ones."""
        logprobs = [None, *prompt_logprobs]
        return [
            ShownToken(*token) for token in zip(self.offsets, self.token_ids, logprobs, strict=True)
        ]


class ChoiceText:
    """Takes the deltas of one choice.

    Args:
        detokenizer: fresh, for this choice alone.
        has_logprobs: whether tokens are shown beside the text.
        echo: what the text begins with.
    """

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        *,
        has_logprobs: bool = False,
        echo: Echo | None = None,
    ) -> None:
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        """The stop string or stop token id that ended it."""
        self._detokenizer = detokenizer
        self._has_logprobs = has_logprobs
        self._echo = echo
        self._echo_length = 0 if echo is None else len(echo.text)
        self._waiting: list[ShownToken] = []
        """Tokens whose text is held back; offsets without the echo."""

    def push(
        self, delta: RequestDelta, prompt_logprobs: Sequence[TokenLogprobs] | None = None
    ) -> tuple[str, int, list[ShownToken]]:
        """The text that is certain now, the number of new tokens, and those that the text shows.

        Tokens behind a stop string, which came before the engine was told, are not counted. A token
        is shown together with the beginning of its text, one without text once nothing before it is
        held back. What a stop string cut off is not shown.
        """
        detokenizer = self._detokenizer
        num_before = detokenizer.num_tokens
        if self._has_logprobs:
            text = self._push_one_by_one(delta)
        else:
            text = detokenizer.push(delta.new_token_ids)
        if delta.finish_reason is not None and detokenizer.stopped_by is None:
            text += detokenizer.finish()
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if detokenizer.stopped_by is not None:
            self.finish_reason, self.stop_reason = "stop", detokenizer.stopped_by
        tokens = self._release() if self._has_logprobs else []
        if self._echo is not None:
            text = self._echo.text + text
            if self._has_logprobs:
                tokens = self._echo.shown(prompt_logprobs or ()) + tokens
            self._echo = None
        return text, detokenizer.num_tokens - num_before, tokens

    def _push_one_by_one(self, delta: RequestDelta) -> str:
        detokenizer, text = self._detokenizer, ""
        for token_id, logprobs in zip(delta.new_token_ids, delta.logprobs or (), strict=True):
            if detokenizer.stopped_by is not None:
                break
            self._waiting.append(ShownToken(detokenizer.num_decoded, token_id, logprobs))
            text += detokenizer.push((token_id,))
        return text

    def _release(self) -> list[ShownToken]:
        detokenizer, waiting = self._detokenizer, self._waiting
        num_shown = detokenizer.num_shown
        is_all_shown = detokenizer.stopped_by is None and (
            self.finish_reason is not None or detokenizer.is_certain
        )
        released = [token for token in waiting if is_all_shown or token.offset < num_shown]
        self._waiting = waiting[len(released) :]
        if not self._echo_length:
            return released
        return [
            ShownToken(token.offset + self._echo_length, token.token_id, token.logprobs)
            for token in released
        ]
