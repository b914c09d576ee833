"""Draws in Triton: one program per draw, which goes over its row as often as the draw needs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagoda_kernels.launch import launch

# Logits of which one maximum is kept, and those that a program takes the maxima of.
_CHUNK, _BLOCK = 128, 2048
# The most logits that a program of a draw has at hand, and those that are added in fp32.
_TILE, _GROUP = 8192, 16

_LARGEST_LOGIT = tl.constexpr(1e30)


def draw_tokens_triton(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """See `pagoda_kernels.sampling.draw_tokens`."""
    num_rows, vocab_size = logits.shape
    num_chunks, num_draws = triton.cdiv(vocab_size, _CHUNK), draws.shape[1]
    # Sizes are the vocabulary's alone, so that no sum depends on the rows beside.
    # Logits that are loaded one by one take registers for their addresses, too.
    most = _TILE if vocab_size % 16 == 0 else _TILE // 2
    tile = min(most, max(1024, triton.next_power_of_2(vocab_size)))
    maxima = torch.empty(num_rows, num_chunks, device=logits.device)
    tokens = torch.empty(num_draws, dtype=torch.int64, device=logits.device)
    sizes = vocab_size, num_chunks, logits.stride(0)
    grid = num_rows, triton.cdiv(vocab_size, _BLOCK)
    launch(maxima_kernel, grid, logits, maxima, *sizes, CHUNK=_CHUNK, BLOCK=_BLOCK, num_warps=4)
    options = {
        "CHUNK": _CHUNK,
        "CHUNKS": max(_GROUP, triton.next_power_of_2(num_chunks)),
        "TILE": tile,
        "TILES": triton.next_power_of_2(triton.cdiv(vocab_size, tile)),
        "GROUP": _GROUP,
        "num_warps": min(16, tile // 256),
    }
    launch(draw_kernel, [num_draws], logits, maxima, draws, tokens, num_draws, *sizes, **options)
    return tokens


# fmt: off
@triton.jit
def maxima_kernel(
    logits_ptr, maxima_ptr,
    vocab_size, num_chunks,
    row_stride,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):
    """The largest logit of each chunk, in all of a row by many programs."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (BLOCK // CHUNK)
    chunks = first + tl.arange(0, BLOCK // CHUNK)
    places = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    maxima = tl.max(_load(logits_ptr + row * row_stride, places, vocab_size), axis=1)
    tl.store(maxima_ptr + row * num_chunks + chunks, maxima, chunks < num_chunks)


@triton.jit(do_not_specialize=["num_draws"])
def draw_kernel(
    logits_ptr, maxima_ptr, draws_ptr, tokens_ptr,
    num_draws, vocab_size, num_chunks,
    row_stride,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    # fmt: on
    """The token of each draw."""
    draw = tl.program_id(0)
    row = tl.load(draws_ptr + draw)
    top_k = tl.load(draws_ptr + num_draws + draw)
    state = tl.load(draws_ptr + 2 * num_draws + draw).to(tl.uint64, bitcast=True)
    temperature = tl.load(draws_ptr + 3 * num_draws + draw).to(tl.float64, bitcast=True)
    min_p = tl.load(draws_ptr + 4 * num_draws + draw).to(tl.float64, bitcast=True)
    top_p = tl.load(draws_ptr + 5 * num_draws + draw).to(tl.float64, bitcast=True)
    logits_ptr += row * row_stride
    maxima_ptr += row * num_chunks

    chunks = tl.arange(0, CHUNKS)
    maxima = _load(maxima_ptr, chunks, num_chunks)
    largest = tl.max(maxima, axis=0)
    chunk = tl.min(tl.where(maxima == largest, chunks, num_chunks), axis=0)
    places = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = _load(logits_ptr, places, vocab_size)
    token = tl.min(tl.where(logits == largest, places, vocab_size), axis=0)

    if temperature > 0.0:
        scale = (1.4426950408889634 / temperature).to(tl.float32)
        # Drawn from are the logits above the border, and those at it with a lower index.
        border = tl.full([], float("-inf"), tl.float32)
        end = tl.full([], vocab_size, tl.int32)
        if (top_k > 0) & (top_k < vocab_size):
            # Of k chunks, the least maximum is at most the k-th largest logit.
            low = _to_key(border)
            high = _to_key(largest) + 1
            if top_k <= num_chunks:
                low, _, _ = _select(maxima_ptr, num_chunks, top_k, low, high, CHUNKS, GROUP)
            low, num_low, num_above = _select(
                logits_ptr, vocab_size, top_k, low, high, TILE, GROUP
            )
            border = _from_key(low)
            if num_low > top_k:
                end = _find_equal(logits_ptr, vocab_size, border, top_k - num_above, TILE) + 1
        least = min_p.to(tl.float32)
        sums = _sum_tiles(
            logits_ptr, vocab_size, largest, scale, least, border, end, TILE, TILES, GROUP
        )
        mass = tl.sum(sums, axis=0)
        wanted = top_p * mass
        attempt = tl.full([], 0, tl.uint64)
        is_drawing = mass > 0.0
        while is_drawing:
            token = _pick(
                logits_ptr, vocab_size, largest, scale, least, border, end,
                sums, _uniform(state, attempt) * mass, TILE, GROUP,
            )
            attempt += 1
            is_drawing = top_p < 1.0
            if is_drawing:
                # Those drawn from next are larger. If they miss top_p, the token is wanted.
                border = _load(logits_ptr, token, vocab_size)
                end = token
                sums = _sum_tiles(
                    logits_ptr, vocab_size, largest, scale, least, border, end, TILE, TILES, GROUP
                )
                mass = tl.sum(sums, axis=0)
                is_drawing = (mass >= wanted) & (mass > 0.0)
    tl.store(tokens_ptr + draw, token.to(tl.int64))


@triton.jit
def _load(ptr, places, length):
    """Logits in fp32, NaN as 0 and no -0.0; -inf beyond the row."""
    logits = tl.load(ptr + places, places < length, other=float("-inf")).to(tl.float32)
    logits = tl.where((logits == logits) & (logits != 0.0), logits, 0.0)
    return tl.minimum(logits, _LARGEST_LOGIT)


@triton.jit
def _weigh(logits, places, length, largest, scale, least, border, end):
    """exp2((logit - largest) * scale) of those drawn from, 0 of others."""
    is_drawn_from = (logits > border) | ((logits == border) & (places < end))
    # Where all are -inf, all have the same weight.
    zero = tl.where(largest > float("-inf"), largest, 0.0)
    weights = tl.exp2(tl.where(logits == largest, 0.0, logits - zero) * scale)
    is_drawn_from = is_drawn_from & (places < length) & (weights >= least)
    return tl.where(is_drawn_from, weights, 0.0)


@triton.jit
def _sum_groups(
    ptr, length, tile, largest, scale, least, border, end, TILE: tl.constexpr, GROUP: tl.constexpr
):
    """[TILE // GROUP] float64: weights of groups of a tile."""
    groups = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    places = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits = _load(ptr, places, length)
    weights = _weigh(logits, places, length, largest, scale, least, border, end)
    return tl.sum(weights, axis=1).to(tl.float64)


@triton.jit
def _sum_tiles(
    ptr, length, largest, scale, least, border, end,
    TILE: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr,
):
    """[TILES] float64: weights of tiles."""
    tiles = tl.arange(0, TILES)
    sums = tl.zeros([TILES], tl.float64)
    for tile in range(0, tl.cdiv(length, TILE)):
        groups = _sum_groups(ptr, length, tile, largest, scale, least, border, end, TILE, GROUP)
        sums = tl.where(tiles == tile, tl.sum(groups, axis=0), sums)
    return sums


@triton.jit
def _pick(
    ptr, length, largest, scale, least, border, end, sums, target,
    TILE: tl.constexpr, GROUP: tl.constexpr,
):
    """The first token whose cumulative weight exceeds the target."""
    tile, rest = _invert(sums, target)
    groups = _sum_groups(ptr, length, tile, largest, scale, least, border, end, TILE, GROUP)
    group, rest = _invert(groups, rest)
    places = (tile * (TILE // GROUP) + group) * GROUP + tl.arange(0, GROUP)
    logits = _load(ptr, places, length)
    weights = _weigh(logits, places, length, largest, scale, least, border, end)
    place, rest = _invert(weights.to(tl.float64), rest)
    return (tile * (TILE // GROUP) + group) * GROUP + place


@triton.jit
def _invert(sums, target):
    """The first place whose cumulative sum exceeds the target, and what is left of the target."""
    places = tl.arange(0, sums.shape[0])
    exceeds = (tl.cumsum(sums, axis=0) > target) & (sums > 0.0)
    # Rounding may leave none; the last with any weight is meant.
    last = tl.max(tl.where(sums > 0.0, places, 0), axis=0)
    place = tl.min(tl.where(exceeds, places, last), axis=0)
    before = tl.sum(tl.where(places < place, sums, 0.0), axis=0)
    return place, tl.maximum(target - before, 0.0)


@triton.jit
def _select(ptr, length, k, low, high, TILE: tl.constexpr, GROUP: tl.constexpr):
    """The key of the k-th largest, how many are at least as large, and how many are larger if those
    are more than k.

    At least k have keys from low on, fewer than k from high on.
    """
    num_low, least, _ = _count(ptr, length, _from_key(low), TILE, GROUP)
    low = _to_key(least)
    num_high = num_low * 0
    step = 0
    while (num_low > k) & (high - low > 1):
        # Where the k-th were if all were evenly spread, and in turn the middle: 64 steps suffice.
        guess = (high - low) * (num_low - k) // (num_low - num_high)
        guess = tl.where(step % 2 == 0, guess, (high - low) // 2)
        middle = low + tl.minimum(tl.maximum(guess, 1), high - low - 1)
        count, least, most = _count(ptr, length, _from_key(middle), TILE, GROUP)
        is_low = count >= k
        num_low = tl.where(is_low, count, num_low)
        num_high = tl.where(is_low, num_high, count)
        low = tl.where(is_low, _to_key(least), low)
        high = tl.where(is_low, high, _to_key(most) + 1)
        step += 1
    return low, num_low, num_high


@triton.jit
def _count(ptr, length, border, TILE: tl.constexpr, GROUP: tl.constexpr):
    """How many logits are at least the border, the least of these, and the largest of others."""
    count = tl.zeros([TILE // GROUP], tl.int32)
    least = tl.full([TILE // GROUP], float("inf"), tl.float32)
    most = tl.full([TILE // GROUP], float("-inf"), tl.float32)
    for first in range(0, length, TILE):
        groups = first // GROUP + tl.arange(0, TILE // GROUP)
        places = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        logits = _load(ptr, places, length)
        is_counted = (logits >= border) & (places < length)
        count += tl.sum(is_counted.to(tl.int32), axis=1)
        least = tl.minimum(least, tl.min(tl.where(is_counted, logits, float("inf")), axis=1))
        most = tl.maximum(most, tl.max(tl.where(is_counted, float("-inf"), logits), axis=1))
    return (
        tl.sum(count, axis=0).to(tl.int64), tl.min(least, axis=0), tl.max(most, axis=0)
    )


@triton.jit
def _find_equal(ptr, length, value, number, TILE: tl.constexpr):
    """The place of a logit of this value, the number-th of these, from 1 on."""
    found = length
    for first in range(0, length, TILE):
        places = first + tl.arange(0, TILE)
        is_equal = (_load(ptr, places, length) == value) & (places < length)
        numbers = tl.cumsum(is_equal.to(tl.int32), axis=0)
        is_it = is_equal & (numbers == number)
        found = tl.minimum(found, tl.min(tl.where(is_it, places, length), axis=0))
        number -= tl.sum(is_equal.to(tl.int32), axis=0)
    return found


@triton.jit
def _to_key(value):
    """Of an fp32 number an int64, in the order of the numbers."""
    bits = tl.cast(value, tl.float32).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _from_key(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _uniform(state, attempt):
    """`uniform.uniform`."""
    value = state + (attempt + 1) * 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    value = (value ^ (value >> 31)) >> 11
    return value.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16
