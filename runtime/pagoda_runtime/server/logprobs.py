"""Logprobs in the forms of OpenAI's answers and of vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pagoda_runtime.client.output_processor import ShownToken
from pagoda_runtime.ipc.messages import TokenLogprobs
from pagoda_runtime.server import answers
from pagoda_runtime.tokenizer.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# JSON has no infinity; it stands for a probability of 0.
LEAST_LOGPROB = -9999.0


@dataclass(slots=True)
class LogprobsWriter:
    """Writes the logprobs of one answer."""

    tokenizer: Tokenizer
    num_top: int | None
    """The likeliest tokens that are shown beside each; None: no logprobs are shown."""
    as_token_ids: bool = False
    """Tokens are `token_id:42` and not their text."""
    _texts: dict[int, str] = field(default_factory=dict)

    def completion(self, tokens: Sequence[ShownToken]) -> answers.CompletionLogprobs | None:
        """The object `logprobs` of a choice of /v1/completions."""
        if self.num_top is None:
            return None
        of_tokens = [token.logprobs for token in tokens]
        return answers.CompletionLogprobs(
            tokens=[self._text(token.token_id) for token in tokens],
            token_logprobs=[None if own is None else clamp(own.logprob) for own in of_tokens],
            top_logprobs=[self._top(own) for own in of_tokens],
            text_offset=[token.offset for token in tokens],
        )

    def chat(self, tokens: Sequence[ShownToken]) -> answers.ChatLogprobs | None:
        """The object `logprobs` of a choice of /v1/chat/completions."""
        if self.num_top is None:
            return None
        content = []
        for token in tokens:
            own = token.logprobs
            assert own is not None, "a chat shows no token of its prompt"
            top = [answers.TokenLogprob(*self._entry(*other)) for other in own.top[: self.num_top]]
            content.append(answers.ShownTokenLogprobs(*self._entry(own.token_id, own.logprob), top))
        return answers.ChatLogprobs(content, None)

    def prompt(self, logprobs: Sequence[TokenLogprobs], num_top: int) -> answers.PromptLogprobs:
        """For each token of the prompt itself and the likeliest in its place, by token id."""
        shown: answers.PromptLogprobs = [None]
        for token in logprobs:
            ranked = [(token.token_id, token.logprob, token.rank)]
            ranked += [(i, logprob, rank) for rank, (i, logprob) in enumerate(token.top, start=1)]
            shown.append(
                {
                    str(token_id): answers.PromptLogprob(
                        clamp(logprob), rank, self._decode(token_id)
                    )
                    for token_id, logprob, rank in ranked[: num_top + 1]
                }
            )
        return shown

    def _top(self, logprobs: TokenLogprobs | None) -> dict[str, float] | None:
        """By text, best first. The token itself is always among them, if need be as one more."""
        if logprobs is None:
            return None
        top: dict[str, float] = {}
        own = logprobs.token_id, logprobs.logprob
        for token_id, logprob in (*logprobs.top[: self.num_top], own):
            # Tokens may share a text; then the likeliest of them is shown.
            top.setdefault(self._text(token_id), clamp(logprob))
        return top

    def _entry(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        """The fields of a answers.TokenLogprob."""
        text = self._decode(token_id)
        is_part = REPLACEMENT in text
        token_bytes = self.tokenizer.token_bytes(token_id) if is_part else text.encode()
        return self._text(token_id), clamp(logprob), list(token_bytes)

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_token_ids else self._decode(token_id)

    def _decode(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            piece = self.tokenizer.piece(token_id)
            text = self.tokenizer.token_text(token_id) if piece is None else piece
            self._texts[token_id] = text
        return text


def clamp(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
