"""The loops of `pagoda_kernels.screened_argmax`: see `pagoda_kernels.compiled`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda_kernels.compiled import (
    Array,
    bf16_bits,
    compiled,
    floats,
    int64s,
    uint8s,
    widen,
    widened,
)

_INT8_MAX = np.float32(127)
# Relative: what bf16 may round away of a logit.
_BF16_ROUNDING = np.float32(2.0**-8)


@compiled
def quantize(
    hidden_at: int,
    integers_at: int,
    deviations_at: int,
    num_rows: int,
    size: int,
    rotation_size: int,
    error: float,
    power: float,
) -> None:
    """See `pagoda_kernels.screened_argmax.quantize_rows`."""
    hidden = bf16_bits(hidden_at, (num_rows, size))
    integers = uint8s(integers_at, (num_rows, size))
    deviations = floats(deviations_at, (num_rows,))
    x = np.empty(size, np.float32)
    for row in range(num_rows):
        widen(hidden[row], x)
        _rotate(x, rotation_size)
        rounding, total = _round(x, integers[row])
        deviations[row] = np.sqrt(np.float32(error) * total + np.float32(power) * rounding)


@compiled
def quantize_weights(
    table_at: int,
    integers_at: int,
    scales_at: int,
    num_rows: int,
    size: int,
    rotation_size: int,
) -> Any:
    """See `pagoda_kernels.screened_argmax.quantize_table`: the two means."""
    table, integers = bf16_bits(table_at, (num_rows, size)), uint8s(integers_at, (num_rows, size))
    scales, x = floats(scales_at, (num_rows,)), np.empty(size, np.float32)
    # The transform makes numbers larger by the square root of its size.
    length = np.sqrt(np.float32(rotation_size))
    error = power = np.float32(0)
    for row in range(num_rows):
        widen(table[row], x)
        _rotate(x, rotation_size)
        for i in range(size):
            x[i] = x[i] / length
        largest = np.float32(1e-30)
        for i in range(size):
            largest = max(largest, abs(x[i]))
        scales[row] = largest / _INT8_MAX
        rounding, total = _round_weights(x, _INT8_MAX / largest, integers[row])
        square = scales[row] * scales[row] / np.float32(size)
        error, power = max(error, rounding * square), max(power, total * square)
    return error, power


@compiled
def _round_weights(x: Array, factor: Any, integers: Array) -> Any:
    """The sums of squares of the roundings, and of the rounded numbers; integers get int8 bits."""
    rounding = total = np.float32(0)
    for i in range(x.size):
        number = x[i] * factor
        whole = np.rint(number)
        integers[i] = np.uint8(np.int32(whole) & np.int32(255))
        total += whole * whole
        rounding += (number - whole) * (number - whole)
    return rounding, total


@compiled
def _rotate(x: Array, rotation_size: int) -> None:
    """The fast Walsh-Hadamard transform, without its factor, which does not matter here."""
    half = 1
    while half < rotation_size:
        for start in range(0, x.size, 2 * half):
            for i in range(start, start + half):
                above, below = x[i], x[i + half]
                x[i] = above + below
                x[i + half] = above - below
        half *= 2


@compiled
def _round(x: Array, integers: Array) -> Any:
    """The sums of squares of the roundings, and of the numbers, where the largest is 127."""
    largest = np.float32(1e-30)
    for i in range(x.size):
        largest = max(largest, abs(x[i]))
    factor = _INT8_MAX / largest
    rounding = total = np.float32(0)
    for i in range(x.size):
        number = x[i] * factor
        whole = np.rint(number)
        integers[i] = np.uint8(np.int32(whole) + np.int32(128))
        total += number * number
        rounding += (number - whole) * (number - whole)
    return rounding, total


@compiled
def choose(
    hidden_at: int,
    table_at: int,
    logits_at: int,
    largest_at: int,
    errors_at: int,
    tokens_at: int,
    num_rows: int,
    size: int,
    vocab_size: int,
    num_chunks: int,
    most_candidates: int,
) -> None:
    """See `pagoda_kernels.screened_argmax.choose_tokens`."""
    hidden = bf16_bits(hidden_at, (num_rows, size))
    table = bf16_bits(table_at, (vocab_size, size))
    logits = bf16_bits(logits_at, (num_rows, num_chunks, vocab_size // num_chunks))
    largest = bf16_bits(largest_at, (num_rows, num_chunks))
    errors, tokens = floats(errors_at, (num_rows,)), int64s(tokens_at, (num_rows,))
    candidates, x = np.empty(most_candidates, np.int64), np.empty(size, np.float32)
    for row in range(num_rows):
        best = _largest(largest[row])
        if not best > 0:
            for i in range(num_chunks):
                best = max(best, _largest(logits[row, i]))
        floor = _floor(best, errors[row])
        count = _collect(logits[row], largest[row], floor, candidates)
        if count > most_candidates:
            tokens[row] = -1
        elif count == 0:
            # Not a number: there is no largest.
            tokens[row] = vocab_size - 1
        else:
            tokens[row] = candidates[0]
            if count > 1:
                widen(hidden[row], x)
                tokens[row] = _likeliest(x, table, candidates, count)


@compiled
def _largest(bits: Array) -> Any:
    best = widened(bits[0])
    for i in range(bits.size):
        best = max(best, widened(bits[i]))
    return best


@compiled
def _floor(best: Any, error: Any) -> Any:
    """What a logit must reach to be the largest, if both it and the largest are off."""
    floor = best - abs(best) * _BF16_ROUNDING - np.float32(2) * error
    return floor - np.float32(2) * _BF16_ROUNDING * abs(floor)


@compiled
def _collect(logits: Array, largest: Array, floor: Any, candidates: Array) -> int:
    """How many logits reach the floor; the first of them go to candidates, in ascending order."""
    count = 0
    num_chunks, chunk = logits.shape
    for i in range(num_chunks):
        # What largest says of a chunk without positive logits means nothing.
        if widened(largest[i]) >= floor or not floor > 0:
            for j in range(chunk):
                if widened(logits[i, j]) >= floor:
                    if count < candidates.size:
                        candidates[count] = i * chunk + j
                    count += 1
    return count


@compiled
def _likeliest(x: Array, table: Array, candidates: Array, count: int) -> int:
    best, token = np.float32(-np.inf), candidates[0]
    for i in range(count):
        logit = _dot(x, table[candidates[i]])
        if logit > best:
            best, token = logit, candidates[i]
    return int(token)


@compiled
def _dot(x: Array, bits: Array) -> Any:
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * widened(bits[i])
    return total
