"""How one request wants its tokens chosen and ended."""

from __future__ import annotations

import msgspec

from pagoda_runtime.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_SEED = 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling and stopping of one request; out-of-range values raise RequestError when verified.

    temperature 0 is greedy. top_k 0 or -1 means all tokens. max_tokens None means as many as the
    context holds. Stop strings are matched by the API process, stop token ids by the engine.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    @property
    def is_greedy(self) -> bool:
        # Below this, logits divided by the temperature leave the range of fp32 softmax.
        return self.temperature < 1e-5 or self.top_k == 1

    def verify(self) -> None:
        """Raise RequestError that names field, value and range for the first value out of range."""
        checks = (
            ("temperature", self.temperature, 0.0 <= self.temperature <= 2.0, "from 0 to 2"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= -1, "-1 or 0 (all tokens), or at least 1"),
            (
                "seed",
                self.seed,
                self.seed is None or -MAX_SEED - 1 <= self.seed <= MAX_SEED,
                "a 64-bit integer",
            ),
            (
                "max_tokens",
                self.max_tokens,
                self.max_tokens is None or self.max_tokens >= 1,
                "at least 1",
            ),
            ("stop", list(self.stop), len(self.stop) <= MAX_STOP_STRINGS, "at most 16 strings"),
            ("stop", list(self.stop), all(self.stop), "strings of at least one character"),
            (
                "stop_token_ids",
                list(self.stop_token_ids),
                all(token_id >= 0 for token_id in self.stop_token_ids),
                "ids of at least 0",
            ),
        )
        for name, value, in_range, expected in checks:
            if not in_range:
                raise RequestError(f"{name} is {value!r}; it must be {expected}.", param=name)
