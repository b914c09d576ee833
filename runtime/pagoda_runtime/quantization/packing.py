"""Whole numbers of few bits that lie side by side in words of 32."""

from __future__ import annotations

import torch

WORD_BITS = 32


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., n * 32 / bits] uint8 of [..., n] int32: a stream of bits, the lowest first.

    Where 32 is no multiple of bits, n is one of bits, and numbers reach from word to word.
    """
    # Not `contiguous`: a dimension of one element keeps strides that cannot be viewed so.
    found = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return found
    if WORD_BITS % bits:
        return _unpack_stream(found, bits)
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    return ((found[..., None] >> places) & (2**bits - 1)).flatten(-2)


def _unpack_stream(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """8 numbers of every `bits` bytes; each has a part of two of them at most."""
    wide = stored.unflatten(-1, (-1, bits)).short()
    numbers = stored.new_empty(*wide.shape[:-1], 8)
    for number in range(8):
        byte, place = divmod(number * bits, 8)
        value = wide[..., byte] >> place
        if place + bits > 8:
            value = value | wide[..., byte + 1] << 8 - place
        numbers[..., number] = value & (2**bits - 1)
    return numbers.flatten(-2)


def span(own: slice, offset: int, per: int, words: int = 1) -> tuple[slice, slice]:
    """Which elements hold some outputs or inputs, and where in what they unpack to these lie.

    Args:
        own: counted from the first that the rank has.
        offset: of that one from the first number of the elements.
        per: numbers in every `words` elements.
    """
    first, last = (offset + own.start) // per, -(-(offset + own.stop) // per)
    skipped = offset + own.start - first * per
    return slice(first * words, last * words), slice(skipped, skipped + own.stop - own.start)
