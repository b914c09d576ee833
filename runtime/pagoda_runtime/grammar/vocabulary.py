"""The tokens of a model as llguidance takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count, islice

from llguidance import TokenizerWrapper

from pagoda_runtime.tokenizer.tokenizer import Tokenizer


class Vocabulary(TokenizerWrapper):
    """What `llguidance.LLTokenizer` asks for, by its names."""

    def __init__(
        self,
        tokens: list[bytes],
        special_token_ids: Sequence[int],
        eos_token_id: int | None,
        encode: Callable[[str], list[int]],
    ) -> None:
        """tokens: by id; empty ones never come, those of special tokens are their names."""
        self.special_token_ids = list(special_token_ids)
        if eos_token_id is None:
            # Some token has to be the end; this one no model has.
            eos_token_id = len(tokens)
            tokens = [*tokens, b""]
        self.tokens = tokens
        self.eos_token_id, self.bos_token_id = eos_token_id, None
        self.is_tokenizer_wrapper = True
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


MakeVocabulary = Callable[[Tokenizer, int, int | None], Vocabulary]
"""Of a tokenizer, the number of a model's tokens, which may be others, and its first end token."""


def whole_vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_token_id: int | None) -> Vocabulary:
    """To compute masks with. Raises ValueError for a tokenizer whose tokens are not bytes."""
    tokens = tokenizer.tokens_in_bytes()
    tokens += [b""] * (vocab_size - len(tokens))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return Vocabulary(tokens, sorted(tokenizer.all_special_ids), eos_token_id, encode)


def light_vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_token_id: int | None) -> Vocabulary:
    """To verify grammars with, in a hundredth of the time and memory: bytes and special tokens."""
    special = tokenizer.all_special_ids
    of_byte = list(islice((i for i in count() if i not in special), 256))
    tokens = [b""] * (max(vocab_size, tokenizer.vocab_size, of_byte[-1] + 1))
    for byte, token_id in enumerate(of_byte):
        tokens[token_id] = bytes([byte])
    for token_id in special:
        tokens[token_id] = tokenizer.token_name(token_id).encode()

    def encode(text: str) -> list[int]:
        return [of_byte[byte] for byte in text.encode()]

    return Vocabulary(tokens, sorted(special), eos_token_id, encode)
